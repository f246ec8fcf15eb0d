"""What a `metrics.json` must look like to be believed: it may be truncated, edited, or of another run."""

import json
import sys
from typing import Any, NoReturn

STATUS = ("done", "failed", "unsupported")
NUMBERS = ("parameters", "bits", "bits_per_weight", "bits_per_parameter", "outlier_ratio")
MEASURED = ("ppl/", "windows/", "layers/", "quantize/", "evaluate/", "warnings/")  # beginnings of keys of numbers
NEEDED = {"done": ("layers/mean_relative_error",), "failed": (), "unsupported": ()}


def parse(text: str) -> dict[str, Any]:
    """The row in a `metrics.json`.

    Raises:
        ValueError: it is not JSON, or not the metrics of a run; the message says what is wrong with it.
    """
    try:
        row = json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(row, dict) or row.get("status") not in STATUS:
        raise ValueError(f"it is not the metrics of a run: there is no status {', '.join(STATUS)}")
    for key in ("method", "model", *(() if row["status"] == "done" else ("stage", "error"))):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key} must be a text, not {row.get(key)!r}")
    for key in NEEDED[row["status"]]:
        if key not in row:
            raise ValueError(f"{key} is missing")
    for key, value in row.items():
        if (key in NUMBERS or key.startswith(MEASURED)) and not _is_number(value):
            raise ValueError(f"{key} must be a number, not {value!r}")
        if key.startswith("protocol/") and "windows/" + key.removeprefix("protocol/") not in row:
            raise ValueError(f"{key} stands without its number of windows")
    return row


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")

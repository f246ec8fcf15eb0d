"""One `metrics.json`, read without believing it: it may be truncated, edited, or made by something else."""

import json
import sys
from pathlib import Path
from typing import Any, NoReturn

STATUS = ("done", "failed", "unsupported")
COUNTS = ("bits", "group_size", "seed", "parameters")
NUMBERS = ("bits_per_weight", "bits_per_parameter", "outlier_ratio")
MEASURED = ("ppl/", "windows/", "layers/", "quantize/", "evaluate/", "warnings/", "agreement/", "zero_shot/")
NOT_MEASURED = ("/version", "/sha256")  # endings of keys that say how something was measured
TEXTS = ("digest", "series", "study", "calibration", "calibration_inputs", "grid_range", "stage", "error")
TRUTHS = ("symmetric", "act_order")


def read(file: Path) -> dict[str, Any]:
    """The metrics of one run.

    Raises:
        ValueError: in a sentence: they are damaged, or a value is not what its name says.
    """
    try:
        row = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse)
        _check(row)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): run it again with force=true") from error
    return row


def _check(row: Any) -> None:
    if not isinstance(row, dict) or row.get("status") not in STATUS:
        raise ValueError(f"it is not the metrics of a run: there is no status {', '.join(STATUS)}")
    for key in ("method", "model", *_needed(row)):
        if row.get(key) is None:
            raise ValueError(f"{key} is missing")
    for key, value in row.items():
        if value is not None and not _fits(key, value):
            raise ValueError(f"{key} cannot be {json.dumps(value)[:80]}")


def _needed(row: dict[str, Any]) -> tuple[str, ...]:
    """What a table shows of every run that is done."""
    if row["status"] != "done":
        return ()
    return ("bits_per_weight", "layers/mean_relative_error", *(() if row.get("method") == "fp16" else ("bits",)))


def _fits(key: str, value: Any) -> bool:
    if key in COUNTS:
        return type(value) is int and abs(value) < 2**63
    if key in NUMBERS or (key.startswith(MEASURED) and not key.endswith(NOT_MEASURED)):
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if key in TRUTHS:
        return isinstance(value, bool)
    if key in ("method", "model", *TEXTS) or key.startswith(("protocol/", "sha256/")):
        return isinstance(value, str)
    return not isinstance(value, dict | list)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")

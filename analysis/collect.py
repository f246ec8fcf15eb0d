"""All runs of a study as one data frame, a row a run."""

from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows import read


def collect(study: Path) -> pd.DataFrame:
    """Read every run of a study folder: its metrics, and under `folder` where they come from.

    Raises:
        FileNotFoundError: the folder holds no runs.
        ValueError: a file is damaged, or two runs with the same text name do not share the text or the protocol.
    """
    rows = []
    for file in sorted(study.glob("*/*/metrics.json")):
        rows.append(read(file) | {"folder": str(file.parent)})
    if not rows:
        raise FileNotFoundError(f"{study} holds no runs: there is no <model>/<run>/metrics.json in it")
    frame = pd.DataFrame(rows)
    _refuse_mixtures(frame)
    return frame


def keep(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """The runs in which `column` has the value that is written `value`, and the unquantized ones.

    Raises:
        ValueError: there is no such column, or no run has that value.
    """
    if column not in frame:
        raise ValueError(f"the runs have no {column}: they have {', '.join(map(str, frame.columns))}")
    written = [_written(entry) for entry in frame[column]]
    if value not in written:
        raise ValueError(f"no run has {column}={value}: there are {', '.join(sorted(set(written)))}")
    wanted = [entry == value or method == "fp16" for entry, method in zip(written, frame["method"], strict=True)]
    return frame.loc[wanted]


def _written(entry: Any) -> str:
    """An entry as it is written on the command line."""
    if entry is None or entry != entry:  # a gap is None or not a number
        return "null"
    return f"{entry:g}" if isinstance(entry, int | float) and not isinstance(entry, bool) else str(entry)


def _refuse_mixtures(frame: pd.DataFrame) -> None:
    """Numbers of one column must be of one text under one protocol (for each model: tokenizers differ)."""
    for column in frame.columns:
        kind, _, text = column.partition("/")
        if kind not in ("protocol", "sha256"):
            continue
        for model, values in frame.groupby("model")[column]:
            different = sorted(set(values.dropna()))
            if len(different) > 1:
                what = "protocols" if kind == "protocol" else "texts (another Python, or other data)"
                raise ValueError(f"the runs of {model} on {text} mix {what}: {', '.join(different)}")

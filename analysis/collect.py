"""All runs of a study as one data frame, a row a run."""

import json
from pathlib import Path

import pandas as pd


def collect(study: Path) -> pd.DataFrame:
    """Read every run of a study folder: its metrics, and under `folder` where they come from.

    Raises:
        FileNotFoundError: the folder holds no runs.
        ValueError: a file is damaged, or two runs with the same text name do not share the text or the protocol.
    """
    rows = []
    for file in sorted(study.glob("*/*/metrics.json")):
        try:
            rows.append(json.loads(file.read_text(encoding="utf-8")) | {"folder": str(file.parent)})
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): run it again with force=true") from error
    if not rows:
        raise FileNotFoundError(f"{study} holds no runs: there is no <model>/<run>/metrics.json in it")
    frame = pd.DataFrame(rows)
    _refuse_mixtures(frame)
    return frame


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

"""Numbers that others published, from `results/published/*.csv`, and which of them belongs beside which of ours."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.series import Row

FOLDER = Path(__file__).parents[1] / "results" / "published"
COLUMNS = ["source", "where", "model", "method", "bits", "group_size", "outlier_ratio"]
COLUMNS += ["text", "protocol", "perplexity", "url"]
OUTLIERS_ALIKE = 0.1  # share by which the outlier ratio may be off: 1 % of 2,048 columns is 20 of them


def published(folder: Path = FOLDER) -> list[Row]:
    """All published numbers, a row each; none where the folder is absent. `perplexity` is text, as it was printed.

    Raises:
        ValueError: a file lacks a column.
    """
    rows: list[Row] = []
    for file in sorted(folder.glob("*.csv")):
        table = pd.read_csv(file, dtype={"perplexity": str})
        if missing := [name for name in COLUMNS if name not in table]:
            raise ValueError(f"{file} has no column {', '.join(missing)}: see the other files there")
        rows += table.to_dict("records")
    return rows


def beside(numbers: list[Row], row: Row, text: str) -> list[Row]:
    """The published numbers that a series' perplexity may be compared with: everything that names it agrees."""
    if row["label"] != row["method"]:
        return []  # it has settings of its own
    asked = {"model": row["model"], "method": row["method"], "text": text, "protocol": row.get(f"protocol/{text}")}
    alike = [number for number in numbers if all(number[name] == value for name, value in asked.items())]
    return [number for number in alike if _same_storage(number, row)]


def _same_storage(number: Row, row: Row) -> bool:
    if row["bits"] is None or _gap(row["bits"]):
        return _gap(number["bits"])
    group = "per-channel" if _gap(number["group_size"]) else f"group {number['group_size']:g}"
    ratio = 0.0 if _gap(number["outlier_ratio"]) else number["outlier_ratio"]
    kept = row.get("outlier_ratio", ratio)
    return number["bits"] == row["bits"] and group == row["grid"] and math.isclose(kept, ratio, rel_tol=OUTLIERS_ALIKE)


def _gap(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))

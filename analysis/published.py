"""Numbers that others published, read from `results/published/*.csv`, and which of them a result may be compared with."""

import math
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.series import Row
from runners.project import ROOT
from runners.results.metrics import OUTLIER_RATIO, group_words, method_words, protocol

PUBLISHED = ROOT / "results" / "published"
COLUMNS = ["source", "where", "model", "method", "bits", "group_size", OUTLIER_RATIO]
COLUMNS += ["text", "protocol", "perplexity", "url"]
# Relative difference of outlier ratios that counts as equal. A structured 1 % is a whole number of columns: 20 of the
# 2,048 of OPT-1.3B are 0.98 %. The ratios that papers print (0.5, 1 and 2 %) differ by a factor of two.
SAME_OUTLIERS = 0.1


def published_numbers(folder: Path = PUBLISHED) -> list[Row]:
    """All published numbers, one row each; none where the folder is absent.

    `perplexity` is the text that was printed, because its digits say how exact it is.

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


def comparable(numbers: list[Row], row: Row, text: str) -> list[Row]:
    """The published numbers of the same model, method, bits, grid, share of outliers, text and protocol as a series."""
    if row["label"] != method_words(row):
        return []  # settings other than the method's own set this series apart
    asked = {"model": row["model"], "method": row["method"], "text": text, "protocol": row.get(protocol(text))}
    alike = [number for number in numbers if all(number[name] == value for name, value in asked.items())]
    return [number for number in alike if _same_storage(number, row)]


def _same_storage(number: Row, row: Row) -> bool:
    if row["bits"] is None or _is_gap(row["bits"]):
        return _is_gap(number["bits"])
    # The words of our grid must be these alone: published grids are asymmetric, min-max, in the columns' own order.
    grid = group_words(None if _is_gap(number["group_size"]) else number["group_size"])
    ratio = 0.0 if _is_gap(number[OUTLIER_RATIO]) else number[OUTLIER_RATIO]
    kept = row.get(OUTLIER_RATIO, ratio)
    return number["bits"] == row["bits"] and grid == row["grid"] and math.isclose(kept, ratio, rel_tol=SAME_OUTLIERS)


def _is_gap(value: Any) -> bool:
    """Whether a CSV file leaves the value out."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))

"""Tables as the papers have them: full precision first, then method by method at each number of bits."""

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import Any

import pandas as pd

ORDER = [  # of the methods; others follow by name
    "fp16",
    "rtn",
    "awq",
    "gptq",
    "quantease",
    "gptq_quantease",
    "quantease_refit",
    "quantease_structured",
    "quantease_outlier",
    "spqr_1pct",
    "spqr",
]
OWN_GRID = "its own"
RAISED = " †"  # after the name of a method that had to raise its damping in some layer
RAISED_NOTE = "† damping was raised in some layers because the factorization failed: see their layers.csv"


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a series of runs that differ only in their seed: mean ± standard deviation of what is done.

    Perplexities, relative layer error and bits per weight; the number of seeds where it is not the same for all.

    Raises:
        ValueError: no run is done.
    """
    done = frame.loc[frame["status"] == "done"]
    if done.empty:
        raise ValueError(f"no run is done: there are {counts(frame)}")
    texts = [column for column in frame.columns if column.startswith("ppl/")]
    series = done.get("series", done["folder"]).fillna(done["folder"])
    rows = [_row(runs, texts) for _, runs in done.groupby(series, sort=False)]
    rows.sort(key=lambda row: row.pop("sort"))
    table = pd.DataFrame(rows)
    if len({row["seeds"] for row in rows if row["bits"]}) < 2:  # the unquantized model has neither
        del table["seeds"]
    return table


def counts(frame: pd.DataFrame) -> str:
    """How many runs ended how: 3 done, 1 failed."""
    return ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())


def _row(runs: pd.DataFrame, texts: list[str]) -> dict[str, Any]:
    first = runs.iloc[0].dropna().to_dict()
    quantized = first["method"] != "fp16"
    raised = "warnings/damping_raised" in runs and runs["warnings/damping_raised"].fillna(0).any()
    row = {
        "sort": _place(first),
        "model": first["model"],
        "bits": str(int(first["bits"])) if quantized else "",
        "grid": _grid(first) if quantized else "",
        "method": first["method"] + RAISED * bool(raised),
        "bits per weight": f"{runs['bits_per_weight'].mean():.2f}",
    }
    for text in texts:
        row[text.removeprefix("ppl/")] = spread(list(runs[text]), 2)
    row["relative layer error"] = spread(list(runs["layers/mean_relative_error"]), 4) if quantized else ""
    return row | {"seeds": str(len(runs))}


def _place(first: dict[Hashable, Any]) -> tuple[Any, ...]:
    """Where a row stands: model, full precision, bits downwards, grid, method."""
    method = first["method"]
    rank = ORDER.index(method) if method in ORDER else len(ORDER)
    words = _grid(first)
    grid = (words == OWN_GRID, -(first.get("group_size") or math.inf), words)
    return first["model"], method != "fp16", -first.get("bits", 0), *grid, rank, method


def _grid(first: dict[Hashable, Any]) -> str:
    """The grid in words, without its bits."""
    group = first.get("group_size")
    if group is None and first["method"].startswith("spqr"):
        return OWN_GRID  # two-level groups, of 16 columns unless the method's settings say otherwise
    words = [f"group {group:g}" if group else "per-channel", "symmetric" * bool(first.get("symmetric"))]
    words += ["mse" * (first.get("grid_range") == "mse"), "act-order" * bool(first.get("act_order"))]
    return " ".join(word for word in words if word)


def spread(values: Sequence[float], digits: int) -> str:
    """The mean and, of more than one value, the (sample) standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown, numbers to the right, and a note on its marks."""
    words = ("model", "method", "grid")
    align = ["left" if name in words else "right" for name in table.columns]
    lines = table.to_markdown(index=False, disable_numparse=True, colalign=align)
    return f"{lines}\n\n{RAISED_NOTE}" if table["method"].str.endswith(RAISED).any() else lines

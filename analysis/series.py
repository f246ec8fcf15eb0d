"""Series: the runs that differ only in their seed, a row each. All tables and figures are made from these rows."""

import math
import re
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.collect import REFERENCE

ORDER = [  # of the methods; others follow by name
    REFERENCE,
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
SD = " sd"  # after a metric's name: the (sample) standard deviation over the seeds
LABELS = ("parameters", "seed", "bits", "group_size")  # numbers that tell runs apart and are no measurement
SHOWN = ("method", "calibration", "evaluation", "model", "scale_bits")  # where settings may differ within one cell


Row = dict[Any, Any]


def summarize(frame: pd.DataFrame) -> list[Row]:
    """One row a series of runs that are done, in the order of a table: models by family and size, full precision first.

    A row has: series, model, family, parameters, method, label (the method's name, and whatever sets it apart from
    another series of the same cell), bits (None for full precision), group_size, grid (in words), seeds (how many),
    folders, damping_raised, rank (among those of its model), the first run's labels that are words, and every measured
    number as its mean over the seeds, beside it `<name> sd`.

    Raises:
        ValueError: no run is done.
    """
    done = frame.loc[frame["status"] == "done"]
    if done.empty:
        raise ValueError(f"no run is done: there are {counts(frame)}")
    sizes = _sizes(done)
    rows = [_row(runs, sizes) for _, runs in done.groupby("series", sort=False)]
    _tell_apart(rows)
    for row in rows:
        row["rank"] = _rank(row)
    rows.sort(key=lambda row: (row["family"], _size(row), row["model"], row["rank"]))
    return rows


def counts(frame: pd.DataFrame) -> str:
    """How many runs ended how: 3 done, 1 failed."""
    return ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())


def protocol(rows: list[Row], text: str) -> str:
    """The protocol of a text's perplexity; one for all rows (`collect` refuses others)."""
    return next((row[f"protocol/{text}"] for row in rows if f"protocol/{text}" in row), "unknown")


def grid_words(first: Row) -> str:
    """The grid of a run in words, without its bits; nothing for full precision."""
    if first["method"] == REFERENCE:
        return ""
    group = first.get("group_size")
    group = None if group is None or math.isnan(group) else group
    if group is None and first["method"].startswith("spqr"):
        return OWN_GRID  # two-level groups, of 16 columns unless the method's settings say otherwise
    words = [f"group {group:g}" if group else "per-channel", "symmetric" * bool(first.get("symmetric"))]
    words += ["mse" * (first.get("grid_range") == "mse"), "act-order" * bool(first.get("act_order"))]
    return " ".join(word for word in words if word)


def _row(runs: pd.DataFrame, sizes: dict[str, float]) -> Row:
    first = runs.iloc[0].dropna().to_dict()
    model, method = first["model"], first["method"]
    row: Row = {
        **{name: value for name, value in first.items() if isinstance(value, str | bool)},
        "family": re.sub(r"-?\d+(\.\d+)?[mb]\d*$", "", model),  # opt-1.3b: opt; llama-2-7b: llama-2; bloom-1b7: bloom
        "parameters": sizes.get(model, math.nan),
        "label": method,
        "bits": None if method == REFERENCE else int(first["bits"]),
        "group_size": first.get("group_size"),
        "grid": grid_words(first),
        "seeds": len(runs),
        "folders": list(runs["folder"]),
    }
    measured = runs.select_dtypes("number").drop(columns=list(LABELS), errors="ignore").dropna(axis=1, how="all")
    for name in measured.columns:
        values = [value for value in measured[name] if not math.isnan(value)]
        row[name] = statistics.fmean(values)
        row[f"{name}{SD}"] = statistics.stdev(values) if len(values) > 1 else math.nan
    return row | {"damping_raised": bool(row.get("warnings/damping_raised", 0) > 0)}


def _sizes(done: pd.DataFrame) -> dict[str, float]:
    pairs = zip(done["model"], done["parameters"], strict=True) if "parameters" in done else ()
    return {model: size for model, size in pairs if size == size}


def _size(row: Row) -> float:
    return -1.0 if math.isnan(row["parameters"]) else row["parameters"]


def _rank(row: Row) -> tuple[Any, ...]:
    """Where a row stands among those of its model: full precision, bits downwards, grid, method."""
    method, group = row["method"], row["group_size"]
    known = ORDER.index(method) if method in ORDER else len(ORDER)
    grid = (row["grid"] == OWN_GRID, -(group or math.inf), row["grid"])
    return method != REFERENCE, -(row["bits"] or 0), *grid, known, method, row["label"]


def _tell_apart(rows: list[Row]) -> None:
    """Give series that would share a cell of a table the settings in which they differ: quantease sweeps=10."""
    cells: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["method"], row["bits"], row["grid"]), []).append(row)
    for cell in cells.values():
        if len(cell) > 1:
            settings = [_settings(Path(row["folders"][0]) / "config.yaml") for row in cell]
            names = sorted({name for other in settings for name in other})
            unlike = [name for name in names if len({entry.get(name) for entry in settings}) > 1]
            for row, entry in zip(cell, settings, strict=True):
                words = [f"{name.split('.')[-1]}={entry[name]}" for name in unlike if name in entry]
                row["label"] = f"{row['method']} {', '.join(words) or '[' + str(row['series']) + ']'}"


def _settings(file: Path) -> dict[str, str]:
    """A run's settings by their dotted names: those that a cell of a table does not show."""
    content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: text for name, text in _flat("", content).items() if name.split(".")[0] in SHOWN}


def _flat(prefix: str, content: Any) -> dict[str, str]:
    if not isinstance(content, dict):
        return {prefix: str(content)}
    inner = [_flat(f"{prefix}.{name}" if prefix else str(name), value) for name, value in content.items()]
    return {name: text for part in inner for name, text in part.items()}

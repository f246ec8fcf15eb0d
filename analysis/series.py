"""Series: the runs that differ only in their seed, as one row each. All tables and figures are made from these rows."""

import math
import re
import statistics
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.collect import read_config
from runners.results.metrics import (
    CALIBRATION,
    CALIBRATION_NAME,
    HELD_OUT_ERROR,
    MODEL_NOTE,
    OWN_GRID,
    REFERENCE,
    RELATIVE_ERROR,
    TOKEN_ERROR,
    UNCALIBRATED,
    Status,
    grid_words,
    method_words,
    protocol,
    status_counts,
    warning,
)

METHOD_ORDER = [  # in tables and legends, from the simplest to the one that stores most; others follow by name
    REFERENCE,
    "rtn",
    "awq",
    "gptq",
    "foem",
    "k_babai",
    "ldlqrg",
    "cdquant",
    "gptaq",
    "qep_gptq",
    "qronos",
    "quantease",
    "qep_quantease",
    "quantease_paired",
    "gptq_quantease",
    "admm_q",
    "quantease_best",
    "awq_refit",
    "gptq_refit",
    "quantease_refit",
    "quantease_structured",
    "quantease_outlier",
    "spqr_1pct",
    "spqr",
]
LABELS = ("parameters", "seed", "bits", "group_size")  # numbers that tell runs apart and measure nothing
TOLD_APART_BY = ("method", "calibration", "evaluation", "model", "scale_bits")  # settings that a table does not show
LAYER_ERRORS = {  # means over the layers of a model, and their names in tables and figures
    RELATIVE_ERROR: "relative layer error",  # that of the calibration's own objective, with its token weights
    HELD_OUT_ERROR: "held-out layer error",  # on sequences that were not used to calibrate
    TOKEN_ERROR: "token layer error",  # on these, every token counting alike
}

Row = dict[Any, Any]


def summarize(frame: pd.DataFrame) -> list[Row]:
    """One row per series of runs that are done, in the order of a table: models by family and size, full precision first.

    A row holds

    - `series`, `model`, `family`, `parameters`, `method`, and the first run's other labels that are words;
    - `label`: the method's name (of full precision the dtype's), and the settings that set it apart from another series of
      the same table entry;
    - `bits` (None for full precision), `group_size`, `grid` (in words);
    - `seeds` (how many), `folders` (of its runs), `places` (the same, from the report), `damping_raised`, `rank` (its
      order among those of its model);
    - every measured number under its key in `metrics.json`, as the mean over the seeds;
    - `deviations`: of the same keys, the sample standard deviation over the seeds, NaN for a single one.

    Raises:
        ValueError: no run is done.
    """
    done = frame.loc[frame["status"] == Status.DONE]
    if done.empty:
        raise ValueError(f"no run is done: there are {status_counts(frame['status'])}")
    sizes = _sizes(done)
    rows = [_row(runs, sizes) for _, runs in done.groupby("series", sort=False)]
    _tell_apart(rows)
    for row in rows:
        row["rank"] = _rank(row)
    rows.sort(key=lambda row: (row["family"], _size(row), row["model"], row["rank"]))
    return rows


def all_keys(summary: list[Row]) -> list[str]:
    """The keys that some row has, in the order in which they first occur."""
    return list(dict.fromkeys(key for row in summary for key in row))


def model_notes(summary: list[Row]) -> list[str]:
    """What must be said with every number of a model, a sentence each."""
    return list(dict.fromkeys(f"{row['model']}: {row[MODEL_NOTE]}" for row in summary if MODEL_NOTE in row))


def protocol_of(summary: list[Row], text: str) -> str:
    """The protocol of a text's perplexity, which is one for all rows (`collect` refuses others)."""
    return next((row[protocol(text)] for row in summary if protocol(text) in row), "unknown")


def _row(runs: pd.DataFrame, sizes: dict[str, float]) -> Row:
    first = runs.iloc[0].dropna().to_dict()
    model, method = first["model"], first["method"]
    row: Row = {
        **{name: value for name, value in first.items() if isinstance(value, str | bool)},
        "family": re.sub(r"-?\d+(\.\d+)?[mb]\d*$", "", model),  # opt-1.3b: opt; llama-2-7b: llama-2; bloom-1b7: bloom
        "parameters": sizes.get(model, math.nan),
        "label": method_words(first),
        "bits": None if method == REFERENCE else _whole(first["bits"]),
        "group_size": first.get("group_size"),
        "grid": grid_words(first),
        "seeds": len(runs),
        "folders": list(runs["folder"]),
        "places": list(runs["place"]),
        "deviations": {},
    }
    measured = runs.select_dtypes("number").drop(columns=list(LABELS), errors="ignore").dropna(axis=1, how="all")
    for name in measured.columns:
        values = [value for value in measured[name] if not math.isnan(value)]
        row[name] = statistics.fmean(values)
        row["deviations"][name] = statistics.stdev(values) if len(values) > 1 else math.nan
    return row | {"damping_raised": bool(row.get(warning("damping_raised"), 0) > 0)}


def _whole(bits: float) -> float:
    """Bits as a whole number where they are one; the mean of unlike layers need not be."""
    return int(bits) if bits == int(bits) else bits


def _sizes(done: pd.DataFrame) -> dict[str, float]:
    """The parameters of each model. Runs that failed to count them take the number from the others of their model."""
    pairs = zip(done["model"], done["parameters"], strict=True) if "parameters" in done else ()
    return {model: size for model, size in pairs if size == size}  # not NaN


def _size(row: Row) -> float:
    return -1.0 if math.isnan(row["parameters"]) else row["parameters"]


def _rank(row: Row) -> tuple[Any, ...]:
    """Sort key among the series of a model: full precision, bits downwards, grid (coarse first, own last), method."""
    method, group = row["method"], row["group_size"]
    known = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
    grid = (row["grid"].startswith(OWN_GRID), -(group or math.inf), row["grid"])
    return method != REFERENCE, -(row["bits"] or 0), *grid, known, method, row["label"]


def _tell_apart(rows: list[Row]) -> None:
    """Label series that would share an entry of a table by the settings in which they differ: `quantease sweeps=10`."""
    entries: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        entries.setdefault((row["model"], row["label"], row["bits"], row["grid"]), []).append(row)
    for sharing in entries.values():
        if len(sharing) > 1:
            settings = [_settings(Path(row["folders"][0])) for row in sharing]
            names = sorted({name for other in settings for name in other})
            unlike = [name for name in names if len({entry.get(name) for entry in _having(name, settings)}) > 1]
            for row, entry in zip(sharing, settings, strict=True):
                words = [f"{_short(name)}={entry[name]}" for name in unlike if name in entry]
                # Where no setting tells them apart (a config.yaml is missing), the digest of the series does.
                row["label"] = f"{row['label']} {', '.join(words) or '[' + str(row['series']) + ']'}"


def _settings(folder: Path) -> dict[str, str]:
    """The settings of a run by their dotted names, without those that its entry in a table shows anyway."""
    content = read_config(folder)
    if CALIBRATION in content and content[CALIBRATION] is None:
        content[CALIBRATION] = {"name": UNCALIBRATED}
    return {name: text for name, text in _flat("", content).items() if name.split(".")[0] in TOLD_APART_BY}


def _having(name: str, settings: list[dict[str, str]]) -> list[dict[str, str]]:
    """Those of the runs that can have a setting: without calibration a run has its name alone."""
    if not name.startswith(f"{CALIBRATION}.") or name == CALIBRATION_NAME:
        return settings
    return [entry for entry in settings if entry.get(CALIBRATION_NAME) != UNCALIBRATED]


def _short(name: str) -> str:
    return CALIBRATION if name == CALIBRATION_NAME else name.split(".")[-1]


def _flat(prefix: str, content: Any) -> dict[str, str]:
    if not isinstance(content, dict):
        return {prefix: str(content)}
    inner = [_flat(f"{prefix}.{name}" if prefix else str(name), value) for name, value in content.items()]
    return {name: text for part in inner for name, text in part.items()}

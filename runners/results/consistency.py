"""What the files of one run say of each other: the numbers in `metrics.json` must be those of its tables.

The perplexity on a text is the exponential of the mean loss of its windows, agreement with the unquantized model is a mean
over windows, and errors and bits are means over layers (`runners.results.layers.summarize_layers`). So most damage that
matters shows even in results that are older than the seal.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from runners.results import metrics
from runners.results.layers import ERRORS
from runners.results.metrics import METRICS

Row = dict[str, str]
PRECISION = 1e-8  # of a mean of numbers that windows.csv has with nine digits
LOSS = "nll"  # the column of windows.csv


def contradiction(folder: Path, run: dict[str, Any]) -> tuple[Path, str] | None:
    """A table of a run that `metrics.json` contradicts, and in what; None where all agree or the run is not done.

    Args:
        run: the run's metrics.
    """
    if run["status"] != metrics.Status.DONE:
        return None
    for name, differences in (("windows.csv", _of_windows), ("layers.csv", _of_layers)):
        try:
            with (folder / name).open(encoding="utf-8", newline="") as opened:
                found = next(differences(list(csv.DictReader(opened, strict=True)), run), None)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            found = f"{type(error).__name__}: {error}"
        if found is not None:
            return folder / name, found
    return None


def _of_windows(rows: list[Row], run: dict[str, Any]) -> Iterator[str]:
    for text in metrics.names(run, "ppl"):
        mine = [row for row in rows if row["text"] == text]
        count = run.get(metrics.windows(text), len(mine))
        if mine and [int(row["window"]) for row in mine] != list(range(count)):
            yield f"it has {len(mine)} windows of {text}, or not in their order, and {METRICS} says {count}"
        for name in [name for name in (mine[0] if mine else {}) if name not in ("text", "window")]:
            key = metrics.ppl(text) if name == LOSS else metrics.agreement(text, name)
            values = [float(row[name]) for row in mine if row[name] != ""]
            if key in run and values:
                mean = fmean(values)
                stated = run[key] if name != LOSS else math.log(run[key])
                if not abs(mean - stated) <= PRECISION * fmean(map(abs, values)) + 1e-12:
                    yield _another(name, math.exp(mean) if name == LOSS else mean, key, run)


def _of_layers(rows: list[Row], run: dict[str, Any]) -> Iterator[str]:
    count = run.get(metrics.LAYER_COUNT)
    if count is None:  # every run that the harness has finished says how many there are
        return
    if len(rows) != count:
        yield f"it has {len(rows)} rows, and {metrics.LAYER_COUNT} in {METRICS} says {count}"
    solved = [row for row in rows if row.get("left_alone") != "True"]
    for key, name in ERRORS.items():
        values = [float(row[name]) for row in solved if row.get(name)]
        yield from _unlike(name, values, [1.0] * len(values), key, run)
    if rows and "out_features" in rows[0]:
        sizes = [float(row["out_features"]) * float(row["in_features"]) for row in rows]
        for key, name in ((metrics.BITS_PER_WEIGHT, "bits_per_weight"), (metrics.OUTLIER_RATIO, "outlier_ratio")):
            yield from _unlike(name, [float(row[name]) for row in rows], sizes, key, run)


def _unlike(
    name: str, values: Sequence[float], weights: Sequence[float], key: str, run: dict[str, Any]
) -> Iterator[str]:
    """A difference between the weighted mean of a column of layers.csv, which has all digits, and what the metrics say."""
    if values and key in run:
        mean = fmean(values, weights)
        if not math.isclose(mean, run[key], rel_tol=1e-12, abs_tol=1e-300):
            yield _another(name, mean, key, run)


def _another(name: str, found: float, key: str, run: dict[str, Any]) -> str:
    return f"its {name} comes to {found:.10g}, and {key} in {METRICS} is {run[key]:.10g}"

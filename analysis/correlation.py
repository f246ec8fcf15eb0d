"""Whether a layer's error tells how good a run is: rank correlation of mean layer errors with the KL divergence.

Spearman's rho is Pearson's correlation of the ranks, ties at their mean rank. It asks only for order: 1 where the run with
the lower layer error always has the lower KL divergence from the unquantized model, 0 where the error does not order the
runs. Runs of fewer bits have both larger, whatever the error tells about methods, so rho is also taken among the runs of one
number of bits and one group size.

Its 95 % interval is a bootstrap over series and not over runs, because the seeds of a series are alike: a resample has all
the runs of a series as often as it has drawn the series. Few series vary too little when resampled; the quantiles are
widened for that, as the expanded percentile interval does (Hesterberg, "What teachers should know about the bootstrap", The
American Statistician 69, 2015), which keeps the interval within -1 and 1.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from analysis.bootstrap import LEVEL, RESAMPLES, Floats
from analysis.series import LAYER_ERRORS, Row
from runners.results.metrics import CHECKPOINT_SHA256, OWN_GRID, REFERENCE, agreement, group_words, names

LEAST_RUNS = 4  # of three, every sixth order is perfect by chance
# Of four series the widened quantiles would be those of 1 resample in 8,000, and every 64th draws one series alone.
LEAST_SERIES = 5
_PART = 1000  # resamples at once, so that studies of hundreds of runs need little memory


@dataclass(frozen=True)
class Correlation:
    """Spearman's rho of two numbers over runs, with its 95 % interval over series; NaN, NaN where these are too few."""

    value: float
    low: float
    high: float
    runs: int
    series: int

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if np.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]")


def run_errors(frame: pd.DataFrame, summary: list[Row]) -> pd.DataFrame:
    """One row per quantized run and text on which its KL divergence is known.

    Series of one and the same quantized model count once, as the first of them: the calibration of RTN changes no weight.

    Columns: `model`, `text`, `series`, `label`, `bits`, `group` (its size in words), `kl`, and the keys of `LAYER_ERRORS`,
    NaN where a run does not have that error.

    Args:
        frame: the runs, from `analysis.collect.collect`.
        summary: their series, from `analysis.series.summarize`; it names them, and the rows follow its order.
    """
    texts = dict.fromkeys(name.split("/")[0] for name in names(frame.columns, "agreement"))
    runs = frame.set_index("folder")
    rows = []
    for row in _of_different_weights(summary):
        named = {name: row[name] for name in ("model", "series", "label", "bits")} | {"group": _group(row)}
        for run in runs.loc[row["folders"]].to_dict("records"):
            errors = {key: run.get(key, np.nan) for key in LAYER_ERRORS}
            rows += [named | {"text": text, "kl": run.get(agreement(text, "kl"), np.nan)} | errors for text in texts]
    columns = ["model", "text", "series", "label", "bits", "group", "kl", *LAYER_ERRORS]
    return pd.DataFrame(rows, columns=pd.Index(columns)).dropna(subset=["kl"]).reset_index(drop=True)


def _of_different_weights(summary: list[Row]) -> list[Row]:
    """The quantized series, without those whose weights are bit for bit those of an earlier one of the model."""
    found: dict[tuple[str, ...], Row] = {}
    for row in (row for row in summary if row["method"] != REFERENCE):
        weights = row.get(CHECKPOINT_SHA256)  # of its first run; absent from results that do not tell
        found.setdefault((row["model"], "series", row["series"]) if weights is None else (row["model"], weights), row)
    return list(found.values())


def correlations(runs: pd.DataFrame) -> pd.DataFrame:
    """The rank correlation of every layer error with the KL divergence, one row each: of all runs of a model, and within
    every number of bits and group size where there are several. Left out where it is not defined (see `rank_correlation`).

    Args:
        runs: from `run_errors`.
    """
    rows = []
    for (model, text), every in runs.groupby(["model", "text"], sort=False):  # pyright: ignore[reportGeneralTypeIssues]
        for among, part in _parts(every):
            for key in LAYER_ERRORS:
                if (found := rank_correlation(part, key)) is not None:
                    named = {"model": model, "text": text, **among, "error": LAYER_ERRORS[key]}
                    measured = {"correlation": found.value, "low": found.low, "high": found.high}
                    rows.append(named | measured | {"runs": found.runs, "series": found.series})
    columns = ["model", "text", "bits", "group", "error", "correlation", "low", "high", "runs", "series"]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def rank_correlation(runs: pd.DataFrame, key: str) -> Correlation | None:
    """Spearman's correlation of one layer error with the KL divergence; the same on every call.

    Args:
        runs: rows of `run_errors` of one model and text.
        key: of the error in `metrics.json`.

    Returns:
        None where fewer than `LEAST_RUNS` runs have both, or one of the two is the same for all.
    """
    known = runs.dropna(subset=[key])
    error, kl = known[key].to_numpy(float), known["kl"].to_numpy(float)
    if len(known) < LEAST_RUNS or len(set(error)) < 2 or len(set(kl)) < 2:
        return None
    series = pd.factorize(known["series"])[0]
    count = int(series.max()) + 1
    value = float(_spearman(np.ones((1, len(known))), error, kl)[0])
    low, high = _interval(series, error, kl) if count >= LEAST_SERIES else (np.nan, np.nan)
    return Correlation(value, low, high, len(known), count)


def _parts(runs: pd.DataFrame) -> Iterator[tuple[Row, pd.DataFrame]]:
    """All runs, then those of each number of bits and group size, unless all are of one."""
    yield {"bits": math.nan, "group": ""}, runs
    parts = list(runs.groupby(["bits", "group"], sort=False))
    for (bits, group), part in parts if len(parts) > 1 else ():  # pyright: ignore[reportGeneralTypeIssues]
        yield {"bits": bits, "group": group}, part


def _group(row: Row) -> str:
    """The group size of a series in words. Not its whole grid: what else sets series apart is what is to be ordered."""
    return OWN_GRID if row["grid"].startswith(OWN_GRID) else group_words(row["group_size"])


def _interval(series: NDArray[np.intp], error: Floats, kl: Floats) -> tuple[float, float]:
    """The expanded percentile interval over series; `series` is the number of each run's."""
    count = int(series.max()) + 1
    # Seeded by how many there are, so that the interval is the same on every machine.
    generator = np.random.default_rng([count, *b"series"])
    drawn = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)[:, series].astype(float)
    found = np.concatenate([_spearman(drawn[i : i + _PART], error, kl) for i in range(0, RESAMPLES, _PART)])
    tail = float(ndtr(np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - LEVEL) / 2)))
    # A resample in which all runs are alike has no correlation.
    low, high = np.nanquantile(found, [tail, 1 - tail])
    return float(low), float(high)


def _spearman(counts: Floats, first: Floats, second: Floats) -> Floats:
    """Spearman's correlation in every resample, (resamples,); NaN where one of the two is the same for all runs.

    Args:
        counts: how often a resample has each run, (resamples, runs).
        first, second: the numbers of the runs, (runs,).
    """
    total = counts.sum(axis=1, keepdims=True)
    x, y = (ranks - (counts * ranks).sum(axis=1, keepdims=True) / total for ranks in _ranks(counts, first, second))
    size = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    product = (counts * x * y).sum(axis=1)
    alike = size <= 1e-9 * total[:, 0] ** 3  # ranks are multiples of 1/2, so sizes that are not zero are far above
    return np.where(alike, np.nan, np.clip(product / np.where(alike, 1, size), -1, 1))


def _ranks(counts: Floats, *values: Floats) -> Iterator[Floats]:
    """The rank of every run in every resample, ties at their mean rank, (resamples, runs), for each of the values."""
    for numbers in values:
        order = np.argsort(numbers, kind="stable")
        different, tied = np.unique(numbers, return_inverse=True)
        starts = np.searchsorted(numbers[order], different)
        among = np.add.reduceat(counts[:, order], starts, axis=1)  # how many runs have each of the different numbers
        yield (np.cumsum(among, axis=1) - among / 2)[:, tied]

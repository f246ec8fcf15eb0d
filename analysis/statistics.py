"""How sure a ratio of two perplexities is: the paired bootstrap over windows and seeds.

Two runs that read the same windows share what makes a window hard, so their losses are compared window by window: the
ratio of the perplexities is exp(mean of the differences). Windows are drawn again with replacement, the same for both.
Where a series has several seeds, these are drawn again too, independently of the windows (a window has one difficulty
for all seeds): Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007). Both series draw the same
seeds where they have the same (one seed is one set of calibration sequences), else each draws its own. A series of
one run says nothing about seeds: then the interval is about the windows alone.

Few seeds resampled vary too little, by sqrt((n-1)/n) and by the normal instead of Student's quantile, so that their
draws are spread by both factors: Hesterberg, "What teachers should know about the bootstrap", The American Statistician
69 (2015), the expanded percentile interval.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

LEVEL = 0.95
RESAMPLES = 10_000

Floats = NDArray[np.float64]
Losses = Mapping[int, Floats]  # of each seed: the mean negative log-likelihood of a token, in nats, window by window


@dataclass(frozen=True)
class Ratio:
    """A ratio of perplexities and its 95 % interval: below 1, the first is the better one."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def perplexity_ratio(first: Losses, second: Losses, resamples: int = RESAMPLES) -> Ratio:
    """The perplexity of `first` over that of `second`, with its paired bootstrap interval (repeatable: seeded).

    Raises:
        ValueError: the two do not have the same number of windows, or none.
    """
    a, b = _matrix(first), _matrix(second)
    if a.shape[1] != b.shape[1] or not a.size:
        raise ValueError(f"the losses of {a.shape[1]} and of {b.shape[1]} windows cannot be paired")
    windows = _draws(a.shape[1], resamples, "windows")
    seeds_a = _draws(len(a), resamples, "seeds")
    seeds_b = seeds_a if first.keys() == second.keys() else _draws(len(b), resamples, "other seeds")
    drawn = ((seeds_a @ a - seeds_b @ b) * windows).sum(axis=1)  # (resamples,)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.exp(a.mean() - b.mean())), float(np.exp(low)), float(np.exp(high)))


def _matrix(losses: Losses) -> Floats:
    """Losses as (seeds, windows), seeds in order."""
    rows = [np.asarray(losses[seed], dtype=float) for seed in sorted(losses)]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the seeds of one series do not have the same number of windows")
    return np.stack(rows) if rows else np.zeros((0, 0))


@lru_cache(maxsize=16)
def _draws(count: int, resamples: int, what: str) -> Floats:
    """The weight of each of `count` things in every resample, (resamples, count); the rows sum to 1."""
    if count == 1:
        return np.ones((resamples, 1))
    generator = np.random.default_rng([count, *what.encode()])
    weights = generator.multinomial(count, np.full(count, 1 / count), resamples) / count
    if what == "windows":  # there are enough
        return weights
    widened = np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2)
    return 1 / count + widened * (weights - 1 / count)

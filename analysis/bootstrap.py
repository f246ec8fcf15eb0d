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
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

LEVEL = 0.95
RESAMPLES = 10_000

Floats = NDArray[np.float64]


class Losses:
    """The mean negative log-likelihood of a token, in nats, of every seed and window of a text.

    Args:
        by_seed: of each seed, its windows in order.

    Raises:
        ValueError: there are no windows, or not the same number for all seeds.
    """

    def __init__(self, by_seed: Mapping[int, ArrayLike]) -> None:
        self.seeds = sorted(by_seed)
        rows = [np.asarray(by_seed[seed], dtype=float) for seed in self.seeds]
        if not rows or not rows[0].size or len({row.shape for row in rows}) > 1:
            raise ValueError(f"seeds must have the same windows, not {[row.size for row in rows]} of them")
        self.nll = np.stack(rows)  # (seeds, windows)

    @cached_property
    def drawn(self) -> Floats:
        """The mean loss in every resample of windows and seeds, (resamples,)."""
        return self._drawn("seeds")

    @cached_property
    def drawn_apart(self) -> Floats:
        """The same with the same windows and other draws of the seeds, for pairs that do not share them."""
        return self._drawn("other seeds")

    def _drawn(self, what: str) -> Floats:
        seeds, windows = self.nll.shape
        return ((_draws(windows, "windows") @ self.nll.T) * _draws(seeds, what)).sum(axis=1)


@dataclass(frozen=True)
class Ratio:
    """A ratio of perplexities and its 95 % interval: below 1, the first is the better one."""

    value: float
    low: float
    high: float

    def inverse(self) -> "Ratio":
        """The second over the first."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def perplexity_ratio(first: Losses, second: Losses) -> Ratio:
    """The perplexity of `first` over that of `second`, with its paired bootstrap interval (repeatable: seeded).

    Raises:
        ValueError: the two do not have the same number of windows.
    """
    counts = first.nll.shape[1], second.nll.shape[1]
    if counts[0] != counts[1]:
        raise ValueError(f"the losses of {counts[0]} and of {counts[1]} windows cannot be paired")
    drawn = first.drawn - (second.drawn if first.seeds == second.seeds else second.drawn_apart)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = first.nll.mean() - second.nll.mean()
    return Ratio(float(np.exp(mean)), float(np.exp(low)), float(np.exp(high)))


@lru_cache(maxsize=16)
def _draws(count: int, what: str) -> Floats:
    """The weight of each of `count` things in every resample, (RESAMPLES, count); the rows sum to 1."""
    if count == 1:
        return np.ones((RESAMPLES, 1))
    generator = np.random.default_rng([count, *what.encode()])
    weights = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    if what == "windows":  # there are enough
        return weights
    widened = np.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2)
    return 1 / count + widened * (weights - 1 / count)

"""The uncertainty of a ratio of two perplexities: a paired bootstrap over evaluation windows and calibration seeds.

Perplexity is the exponential of the mean loss per token, so the ratio of two of them is the exponential of the mean
difference of losses. Two runs that read the same windows share what makes a window hard, which is most of the variation
between windows: the differences are taken window by window, and the windows are resampled with replacement, the same
ones for both runs.

Where a series has several seeds, these are resampled too, independently of the windows, because the two are crossed and
not nested (each seed is measured on every window): Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1
(2007). Two series with the same seeds resample them together (a seed is one set of calibration sequences, which is good
or bad for both methods), else each resamples its own. A series of one run says nothing about seeds; its interval covers
the windows alone.

Few seeds, when resampled, vary too little for two reasons: the plug-in variance divides by n and not by n - 1, and a
percentile interval uses the normal quantile where Student's applies. The resampled means are spread by both factors:
Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69 (2015), the expanded percentile
interval.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

LEVEL = 0.95
# The ends of the interval are 2.5 % quantiles: their Monte Carlo error, sqrt(0.025 * 0.975 / RESAMPLES) over the normal
# density there, is 0.7 % of the interval's width, less than the digits that tables print.
RESAMPLES = 10_000

Floats = NDArray[np.float64]
Resampled = Literal["windows", "seeds", "other seeds"]  # each has a random stream of its own


class Losses:
    """The losses of one series on one text: the mean negative log-likelihood per token, in nats, of every window.

    Args:
        by_seed: for each seed, the losses of its windows, in the order of the text.

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
    def resampled_means(self) -> Floats:
        """The mean loss in every resample of windows and seeds, (RESAMPLES,)."""
        return self._resample("seeds")

    @cached_property
    def resampled_means_other_seeds(self) -> Floats:
        """The same on the same windows, with seeds drawn independently, for a pair that does not share its seeds."""
        return self._resample("other seeds")

    def _resample(self, seeds_stream: Resampled) -> Floats:
        seeds, windows = self.nll.shape
        # A resample's mean is bilinear in the weights of seeds and windows: sum over s, w of a_s b_w nll[s, w]. As a
        # matrix product it needs (RESAMPLES, seeds) numbers in place of (RESAMPLES, seeds, windows).
        by_seed = _weights(windows, "windows") @ self.nll.T
        return (by_seed * _weights(seeds, seeds_stream)).sum(axis=1)


@dataclass(frozen=True)
class Ratio:
    """A ratio of perplexities with its 95 % interval; below 1 the first of the two is better."""

    value: float
    low: float
    high: float

    def inverse(self) -> "Ratio":
        """The second over the first."""
        return Ratio(1 / self.value, 1 / self.high, 1 / self.low)

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def perplexity_ratio(first: Losses, second: Losses) -> Ratio:
    """The perplexity of `first` over that of `second`, with its paired bootstrap interval; the same on every call.

    Over several seeds it is the ratio of the geometric means of their perplexities (the mean is taken of losses).

    Raises:
        ValueError: the two do not have the same number of windows.
    """
    counts = first.nll.shape[1], second.nll.shape[1]
    if counts[0] != counts[1]:
        raise ValueError(f"the losses of {counts[0]} and of {counts[1]} windows cannot be paired")
    # Both use the same stream of windows, so subtracting resample by resample pairs them. The seeds are paired in the
    # same way if they are the same ones, and not otherwise: then the spreads of both series add up.
    paired = first.seeds == second.seeds
    difference = first.resampled_means - (second.resampled_means if paired else second.resampled_means_other_seeds)
    low, high = np.quantile(difference, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = first.nll.mean() - second.nll.mean()
    return Ratio(float(np.exp(mean)), float(np.exp(low)), float(np.exp(high)))


@lru_cache(maxsize=16)  # all series of a study share their few counts of windows and seeds
def _weights(count: int, resampled: Resampled) -> Floats:
    """The share of each of `count` things in every resample, (RESAMPLES, count); rows sum to 1."""
    if count == 1:
        return np.ones((RESAMPLES, 1))
    # Seeded by what is resampled and not by the pair: every pair of series meets the same resamples, so that ratios are
    # consistent with each other, and intervals are the same on every machine.
    generator = np.random.default_rng([count, *resampled.encode()])
    weights = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
    if resampled == "windows":
        return weights  # dozens or more: of 64, the bundled texts', the correction below would be 3 %
    # Three seeds are widened by sqrt(3/2) * 4.30/1.96 = 2.7. The weights are spread about their mean, 1/count, so that
    # they still sum to 1; a weight may become negative, which does no harm to a mean.
    small_sample = np.sqrt(count / (count - 1))
    student = stdtrit(count - 1, (1 + LEVEL) / 2) / ndtri((1 + LEVEL) / 2)
    return 1 / count + small_sample * student * (weights - 1 / count)

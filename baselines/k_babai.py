"""K-best Babai (OJBKQ, 2026, https://arxiv.org/abs/2602.08376): GPTQ and K random paths beside it, per row the best.

GPTQ is Babai's nearest-plane algorithm on the lattice of the grid (https://arxiv.org/abs/2507.18553): column after column it
takes the level nearest to the compensated weight c_j, and never looks back. Klein's algorithm takes the level z at random,

    with probability proportional to exp(-t R_jj^2 (c_j - z)^2),    R_jj = 1 / U_jj with GPTQ's factor U,

so the more the column's rounding error costs, the more surely it takes the nearest one. The answer for a row is that of its
K + 1 paths whose error is the least. It is never worse than GPTQ's on the same grid.

The random paths run on GPTQ's own pass, as so many more rows. Between the two levels around c_j, a step s apart, the odds
are those of rounding c_j + s x to nearest with x = logit(u) / (2 t R_jj^2 s^2) for a uniform u. A path is therefore
rounding to nearest with noise, which is kept within half a step; levels further away, which Klein's algorithm takes with
vanishing probability, are left out. Where levels have unequal distances (nf4, mxfp4, nvfp4), s is their mean distance.

All rows are given the same uniform numbers, so that the answer of a row does not depend on which other rows there are. The
grids of groups are those of the original weights: all paths lead to points of one lattice. The choice of t is that of Liu,
Ling and Stehle (https://arxiv.org/abs/1003.0064) for K samples of a lattice; that of OJBKQ's code is not known to us.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines.gptq import answer_on, coupling_of, feed_back
from baselines.ldlqrg import disturbed
from quantease.cholesky import inverse_factor
from quantease.grid import GridSpec
from quantease.kernels import Columns
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


@dataclass(frozen=True)
class KBabai(LayerSolver):
    """GPTQ's path and `paths` random ones, per row the best.

    Attributes:
        paths: K, the number of random paths: the time and memory of GPTQ times K + 1.
        sharpness: t times the least R_jj^2 s_j^2 of a row: how surely the nearest level is taken where that matters least.
            None: what suits K and the number of columns.
        damping: as of GPTQ.
        seed: of the random paths.
    """

    paths: int = 5
    sharpness: float | None = None
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, not {self.damping}")
        if self.paths < 1:
            raise ValueError(f"paths must be at least 1, not {self.paths}: without one it is method=gptq")
        if self.sharpness is not None and self.sharpness <= 0:
            raise ValueError(f"sharpness must be positive, not {self.sharpness}")

    @property
    def rows_independent(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        factor, damping = inverse_factor(problem, self.damping)
        # R_jj^2 (in,); dead inputs are rounded to nearest, whatever that costs
        cost = torch.where(problem.hessian.diagonal() > 0, factor.diagonal().pow(-2), torch.inf)
        coupling, columns = coupling_of(factor), grid.columns()
        noise = self._noise(cost, _steps(columns))
        weight = problem.weight.T
        paths = [weight.contiguous(), *(disturbed(weight, path, coupling) for path in noise)]
        values = feed_back(torch.cat(paths, 1), coupling, _repeated(columns, len(paths)))
        best = _best(values.T.reshape(len(paths), *problem.weight.shape), problem)
        return answer_on(grid, best.T, self.damping, damping)

    def _noise(self, cost: Tensor, steps: Tensor) -> Tensor:
        """What is added to the weights of each path before they are rounded (paths, in, out).

        Args:
            cost: R_jj^2 (in,); infinite where there is to be no noise.
            steps: s (in, out).
        """
        # Drawn on the CPU, so that all devices have the same numbers.
        draws = torch.rand(self.paths, len(cost), 1, generator=torch.Generator().manual_seed(self.seed))
        sharpness = sharpness_for(self.paths, len(cost)) if self.sharpness is None else self.sharpness
        costs = cost[:, None] * steps.square()
        odds = 2 * sharpness * costs / costs.amin(0)  # 2 t R_jj^2 s_j^2 (in, out)
        noise = (draws.logit().to(steps) / odds).clamp_(-0.5, 0.5) * steps
        return torch.where(cost[:, None].isinf(), 0.0, noise)


def sharpness_for(paths: int, columns: int) -> float:
    """ln rho for the rho with (e rho)^(2 n / rho) = K, the best choice for K samples of a lattice of n dimensions."""
    low, high = 0.0, 100.0  # of ln rho; the left side falls from e^(2 n) to 1
    for _ in range(60):
        middle = (low + high) / 2
        if 2 * columns / math.exp(middle) * (1 + middle) > math.log(max(paths, 2)):
            low = middle
        else:
            high = middle
    return max(high, 1e-3)


def _steps(columns: Columns) -> Tensor:
    """The distance (in, out) between neighboring values, or where they are unequal its mean."""
    scale = columns.scale[columns.group]
    if columns.levels is None:
        return scale
    return scale * ((columns.levels[-1] - columns.levels[0]) / columns.max_code)


def _repeated(columns: Columns, times: int) -> Columns:
    """The grid of so many copies of the rows."""
    return replace(columns, scale=columns.scale.repeat(1, times), zero=columns.zero.repeat(1, times))


def _best(paths: Tensor, problem: LayerProblem) -> Tensor:
    """For each row (out, in) the path, of (paths, out, in), with the least error."""
    differences = paths - problem.weight
    errors = torch.stack([(part @ problem.hessian).mul_(part).sum(1) for part in differences])  # (paths, out)
    return paths[errors.argmin(0), torch.arange(len(problem.weight), device=paths.device)]

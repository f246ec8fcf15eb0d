"""AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): activation-aware scaling of the weights, then clipping.

Column j of the weight is multiplied by s_j = mean|x_j|^a before it is rounded and divided by it afterwards, which makes the
columns finer that meet large inputs; a is searched on a grid of 20. Layers that share an input share s, as it is meant to
be folded into what produces that input. Then the range of each group is shrunk as far as that lowers the group's error.

The authors measure errors on the outputs of the attention or the block for a sample of tokens; here the error is that of
the layers' own outputs, and exact for all calibration tokens: tr(D H D^T).

The scale search is Section 3.2, equations 4 and 5, of the paper; the clip search is only in the authors' code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantease.grid import Grid, GridSpec
from quantease.grids.scale_formats import FP16
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported, objective
from quantease.normal_scale import at_normal_scale

# The sizes of inputs that scales are made of are clamped: a dead input has size zero, and would get a scale of zero or,
# with the others relative to it, an infinite one. The authors clamp at 1e-4, here it is relative to the mean, so that the
# scale of the inputs does not matter.
LEAST_INPUT = 1e-4
ALL_DEAD = 1e-30  # keeps the size positive where every input is dead; all scales are then 1
LEAST_SCALE, LARGEST_SCALE = 1e-4, 6e4  # of float16 (which ends at 65,504), in which scales are stored


@dataclass(frozen=True)
class AWQ(LayerSolver):
    """The scale search and the clip search.

    Attributes:
        scale_steps: exponents a = 0, 1/n, ... that are tried.
        clip_steps: ranges that are tried, from the whole down to `max_shrink` less; 0: no clipping.
        max_shrink: the share of the range that may be cut off.
    """

    scale_steps: int = 20
    clip_steps: int = 20
    max_shrink: float = 0.5

    def __post_init__(self) -> None:
        if self.scale_steps < 1 or self.clip_steps < 0:
            raise ValueError("scale_steps must be at least 1, and clip_steps must not be negative")
        if not 0 < self.max_shrink < 1:
            raise ValueError(f"max_shrink must lie between 0 and 1, not {self.max_shrink}")

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        scale = self._best_scale(problem, spec)
        problem = problem.scaled(scale)
        grid = self._clip(problem, problem.fit_grid(spec), spec)
        return QuantizedLayer(grid.encode(problem.weight), grid, column_scale=scale)

    def _clip(self, problem: LayerProblem, whole: Grid, spec: GridSpec) -> Grid:
        """For each row and group the range with the least error of that group's own part of the output."""
        # All groups have the same size, so sorting the columns by group gives them row by row, also in act-order.
        columns = whole.group.argsort(stable=True).view(whole.groups, -1)  # (groups, group_size)
        within = problem.hessian[columns[:, :, None], columns[:, None, :]]  # (groups, group_size, group_size)
        largest = problem.weight.abs()[:, columns].amax(-1)[:, whole.group]  # (out, in), max |w| of each weight's group
        grid, errors = whole, _group_errors(problem, whole, columns, within)
        for step in range(1, self.clip_steps):
            # The grid is fitted to clipped weights, but errors are those of the whole weights on it.
            bound = (1 - self.max_shrink * step / self.clip_steps) * largest
            trial = problem.fit_grid(spec, problem.weight.clamp(-bound, bound), like=whole)
            trial_errors = _group_errors(problem, trial, columns, within)
            grid = trial.where(trial_errors < errors, grid)
            errors = torch.minimum(errors, trial_errors)
        # Each group was judged on its own, without the correlations between groups: undo it in rows whose error rose.
        return grid.where((_row_errors(problem, grid) <= _row_errors(problem, whole))[:, None], whole)

    def _best_scale(self, problem: LayerProblem, spec: GridSpec) -> Tensor:
        """The scale (in,) with the least error over all layers that share the input; the first of equals.

        Exponent 0 is always tried first: all scales 1, which is plain rounding.

        Raises:
            Unsupported: the problem has no `mean_input`.
        """
        if problem.mean_input is None:
            raise Unsupported(
                "AWQ needs the mean of |x| of every input, and there is none where a rotation mixes inputs"
            )
        best, least = torch.ones_like(problem.mean_input), torch.inf
        for step in range(self.scale_steps):
            scale = _scale(problem.mean_input, step / self.scale_steps)
            scaled = problem.scaled(scale)
            error = 0.0
            for weight in (scaled.weight, *scaled.siblings):
                grid = scaled.fit_grid(spec, weight)
                error += objective(grid.decode(grid.encode(weight)) - weight, scaled.hessian)
            if error < least:
                best, least = scale, error
        return best


def _scale(mean_input: Tensor, exponent: float) -> Tensor:
    """mean|x|^a (in,), normalized so that the largest and the smallest are each other's inverse, as it is stored.

    The normalization is the authors': it keeps scaled weights about as large as they were, within float16's range.
    """
    scale = mean_input.clamp(min=LEAST_INPUT * float(mean_input.mean()) + ALL_DEAD).pow(exponent)
    return FP16.storable((scale / (scale.max() * scale.min()).sqrt()).clamp(LEAST_SCALE, LARGEST_SCALE))


def _group_errors(problem: LayerProblem, grid: Grid, columns: Tensor, within: Tensor) -> Tensor:
    """(out, groups): d_g H_gg d_g^T for the part d_g of a row's rounding error that lies in group g.

    Args:
        columns: (groups, group_size), those of each group.
        within: (groups, group_size, group_size), their part of the Hessian.
    """
    part = _error(problem, grid).T[columns]  # (groups, group_size, out)
    return (part * (within @ part)).sum(1).T


def _row_errors(problem: LayerProblem, grid: Grid) -> Tensor:
    """(out,): d H d^T for the rounding error d of each row, all groups and their correlations together."""
    difference = _error(problem, grid)
    return (difference @ problem.hessian * difference).sum(1)


def _error(problem: LayerProblem, grid: Grid) -> Tensor:
    """(out, in): what rounding to nearest changes."""
    return grid.decode(grid.encode(problem.weight)) - problem.weight

"""CDQuant (Nair and Suggala, 2024, https://arxiv.org/abs/2406.17542): greedy coordinate descent.

With g = (q - w) H, half the slope of the loss of a row, moving its weight j to the level r changes the loss by

    H_jj (r - q_j)^2 + 2 (r - q_j) g_j,

which is least for the level nearest to q_j - g_j / H_jj. Every step makes the move of each row that lowers its loss most,
where QuantEase takes the columns in turn, and adds (r - q_j) H_j to g. It ends where no move lowers the loss: no row is
ever worse than where it started, which is rounding to nearest, or another method's answer.

All rows step at once: a step costs a rounding of the whole weight, and a row is left out once nothing lowers its loss. The
host asks which rows are left every 32 steps, so that a GPU need not wait for it in between.

Where this departs from the paper: it starts from the grid that all methods share and not from clipped ranges of its own,
and it has no moves of two coordinates at once. As all descents here it is damped only where the rank of the Hessian is low
(quantease/conditioning.py).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.conditioning import damp_rank_deficient
from quantease.grid import Grid, GridSpec
from quantease.grids.rows import row_slices
from quantease.kernels.plain import nearest_level_codes, nearest_values
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale
from quantease.sweeps import hessian_with_positive_diagonal

STEPS = 32  # between two looks of the host at which rows are left
FRESH = 512  # steps after which g is computed anew: the rounding errors of its updates add up


@dataclass(frozen=True)
class CDQuant(LayerSolver):
    """Greedy descent from rounding to nearest.

    Attributes:
        moves_per_column: steps at most, per column: a row of n weights makes no more than that times n moves.
    """

    moves_per_column: float = 4.0

    def __post_init__(self) -> None:
        if self.moves_per_column <= 0:
            raise ValueError(f"moves_per_column must be positive, not {self.moves_per_column}")

    @property
    def rows_independent(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        damped, damping, notes = damp_rank_deficient(problem.hessian)
        hessian = hessian_with_positive_diagonal(damped)
        limit = max(1, round(self.moves_per_column * problem.weight.shape[1]))
        values = grid.decode(grid.encode(problem.weight))
        for rows in row_slices(values):  # the working copies of a few rows are small
            values[rows] = _descend(values[rows], problem.weight[rows], hessian, grid.of_rows(rows), limit)
        raised = damping is not None
        return QuantizedLayer(grid.encode(values), grid, damping=damping, damping_raised=raised, notes=notes)


def _descend(values: Tensor, target: Tensor, hessian: Tensor, grid: Grid, limit: int) -> Tensor:
    """The values (rows, in) after at most `limit` moves of each row."""
    left, state = torch.arange(len(values), device=values.device), _State.of(values.clone(), target, hessian, grid)
    moved = torch.ones(len(values), dtype=torch.bool, device=values.device)
    for step in range(0, limit, STEPS):
        if step and step % FRESH == 0:
            state = replace(state, slope=(state.values - state.target) @ hessian)
        for _ in range(min(STEPS, limit - step)):
            moved = state.move(hessian)
        values[left] = state.values
        going_on = moved.nonzero().flatten()
        if len(going_on) == 0:
            break
        if len(going_on) <= 3 / 4 * len(moved):  # a copy is worth it
            left, state = left[going_on], state.rows(going_on)
    return values


@dataclass(frozen=True, eq=False)
class _State:
    """Some rows on their way; all tensors are (rows, in), or (rows, 1) where a row has one scale."""

    values: Tensor
    target: Tensor
    slope: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor | None
    thresholds: Tensor | None
    max_code: int

    @classmethod
    def of(cls, values: Tensor, target: Tensor, hessian: Tensor, grid: Grid) -> "_State":
        columns = grid.columns()
        group = columns.group[:1] if grid.groups == 1 else columns.group
        scale, zero = (table[group].T.contiguous() for table in (columns.scale, columns.zero))
        slope = (values - target) @ hessian
        return cls(values, target, slope, scale, zero, columns.levels, columns.thresholds, columns.max_code)

    def rows(self, rows: Tensor) -> "_State":
        """Some of the rows."""
        names = ("values", "target", "slope", "scale", "zero")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def move(self, hessian: Tensor) -> Tensor:
        """Make each row's best move, in place, and say which rows (rows,) had one that lowers the loss."""
        curvature = hessian.diagonal()
        nearest = self._nearest(self.values - self.slope / curvature)
        change = nearest - self.values
        gain = change * (change * curvature + 2 * self.slope)
        least, best = gain.min(1, keepdim=True)  # (rows, 1)
        moves = least < 0
        self.slope.addcmul_(hessian[best[:, 0]], torch.where(moves, change.gather(1, best), 0.0))
        self.values.scatter_(1, best, torch.where(moves, nearest.gather(1, best), self.values.gather(1, best)))
        return moves[:, 0]

    def _nearest(self, wanted: Tensor) -> Tensor:
        """The nearest values of the grid."""
        if self.levels is None or self.thresholds is None:
            return nearest_values(wanted, self.scale, self.zero, self.max_code)
        return self.levels[nearest_level_codes(wanted, self.scale, self.thresholds)] * self.scale

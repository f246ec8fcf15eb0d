"""FOEM (Zheng et al., AAAI 2026, https://arxiv.org/abs/2507.11017): GPTQ with the first-order term of the loss.

GPTQ assumes that the loss has no slope at the weights that it has compensated so far. They have moved away from the original
ones w0, so it has, and FOEM takes the slope for proportional to that move. With the factor U of GPTQ and b = `beta`,

    e = ((w_j - q_j) - b (w_j - w0_j)) / U_jj,    w_k <- w_k - e U_jk  for k > j,
    w_{j+1} <- w_{j+1} - b (w_{j+1} - w0_{j+1}),

so each column is drawn back towards w0 before it is rounded. It needs the Hessian alone, at the cost of GPTQ.

It runs on GPTQ's pass. Within a column block let p be the weights as the columns before the block leave them, x what is
rounded, y = x - w0 and g = q - x. With a = 1 - b and GPTQ's coupling c_jk = -U_jk / U_jj for k > j, the equations say

    y_k = a (p_k - w0_k) - a sum_{j<k} c_jk (g_j + b y_j),    that is    y = a (p - w0) M - g (a c M),    M = (I + a b c)^-1:

GPTQ's pass from w0 + a (p - w0) M, with the coupling a c M. Later columns then change by -(g + b y) c.

Where this departs from the code in GPTQModel (with alpha = 0): that does not draw the first column of a block of 128 back.
Here the blocks change nothing, as with GPTQ, and the grids of groups are fitted as GPTQ's are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.gptq import BLOCK, answer_on, column_blocks, coupling_of, first_columns
from quantease.cholesky import inverse_factor
from quantease.grid import Grid, GridSpec
from quantease.kernels import run_block
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


@dataclass(frozen=True)
class FOEM(LayerSolver):
    """GPTQ whose compensated weights are drawn back towards the original ones.

    Attributes:
        beta: b, the share of a column's move that is taken back; 0: GPTQ.
        damping: as of GPTQ.
        static_groups: as of GPTQ.
    """

    beta: float = 0.2
    damping: float = 0.01
    static_groups: bool = False

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, not {self.damping}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must be at least 0 and below 1, which would undo all compensation; not {self.beta}")

    @property
    def rows_independent(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        factor, damping = inverse_factor(problem, self.damping)
        values = self._feed_back(problem.weight.T.contiguous(), coupling_of(factor), grid)
        return answer_on(grid, values, self.damping, damping)

    def _feed_back(self, original: Tensor, coupling: Tensor, grid: Grid) -> Tensor:
        """The rounded values (in, out), from the original weights (in, out)."""
        weight, values, columns = original.clone(), torch.empty_like(original), grid.columns()
        first = {} if self.static_groups or grid.groups == 1 else first_columns(grid.group)
        for start, stop in column_blocks(len(weight), BLOCK, first):
            here, later = slice(start, stop), slice(stop, None)
            if start in first:
                grid.fit_group_(first[start], weight[grid.group == first[start]].T, columns)
            drawn, inner = self._drawn_back(weight[here] - original[here], coupling[here, here].triu(1))
            work = original[here] + drawn
            run_block(values[here], work, inner, columns[here])  # work now holds g = q - x
            fed_back = work + self.beta * (values[here] - work - original[here])  # g + b y
            weight[later].addmm_(coupling[here, later].T, fed_back, alpha=-1)
        return values

    def _drawn_back(self, move: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
        """a (p - w0) M (block, out) for the move p - w0, and a c M (block, block) for the strict coupling c."""
        kept = 1 - self.beta
        inverted = (kept * self.beta * coupling).add_(
            torch.eye(len(coupling)).to(coupling)
        )  # I + a b c, unit triangular
        inner = torch.linalg.solve_triangular(inverted, kept * coupling, upper=True, left=False, unitriangular=True)
        # Here a row of the layer is a column: (move^T M)^T = M^T move.
        drawn = torch.linalg.solve_triangular(inverted.T, kept * move, upper=False, unitriangular=True)
        return drawn, inner.contiguous()

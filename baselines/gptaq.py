"""GPTAQ (Li et al., 2025, https://arxiv.org/abs/2504.02692): GPTQ that also makes up for what the inputs have lost.

The layer is to give W X, the outputs in the unquantized model, on the inputs X^ that the quantized blocks before it leave.
With the cross moment C = (X - X^) X^^T, column j takes the part w_j (x_j - x^_j) of what is missing and hands it to the
columns after it (set R), which carry it best by the least squares of their own inputs:

    w_R <- w_R + w_j P_jR,    P_jR = alpha C_jR (H_RR)^-1,    beside GPTQ's feedback of the rounding error of w_j.

With the factor of the inverse Hessian, H^-1 = U^T U, all rows at once are P = alpha triu_strict(C U^T) U, as
(H_RR)^-1 = U_RR^T U_RR.

**On the shared pass.** P_jR multiplies the weight w_j as it is when its turn comes, so it is not GPTQ's recursion. But it
is linear: with K GPTQ's coupling, W the original weights and T (out, in) the weights as they are rounded, whose rounding
changes are E, T = W + T P - E K. So T = W (I - P)^-1 - E K (I - P)^-1, where I - P is unit upper triangular: GPTQ's
pass on other weights with another coupling, each by one triangular solve.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.gptq import answer_on, coupling_of, feed_back
from quantease.cholesky import inverse_factor
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


@dataclass(frozen=True)
class GPTAQ(LayerSolver):
    """GPTQ with the cross moment; without one, or where nothing was lost, it is GPTQ, code by code.

    Departs from the authors' code in three ways. There, columns after a block of 128 are handed q_j P, not w_j P, so the
    answer depends on the block (by rounding errors times P); a group's grid is fitted to weights that lack what its block
    has handed on, and here to weights with all that is known when its first column is reached: the compensation of the
    columns before it, and what its own columns will hand on to each other. And weights of dead inputs are kept (their
    inputs may have been lost) and rounded to nearest.

    Attributes:
        alpha: the share of the loss that is made up for; 0.25 in the authors' code, 1 in the paper's equations.
        damping: fraction of the mean Hessian diagonal that is added to the diagonal, raised as in GPTQ.
        block_size: columns per matrix product: changes the speed, not the result.
        static_groups: fit the grids of all groups to the original weights.
    """

    alpha: float = 0.25
    damping: float = 0.01
    block_size: int = 128
    static_groups: bool = False

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.damping < 0:
            raise ValueError("alpha must not be negative, and damping must not be negative")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    @property
    def rows_independent(self) -> bool:
        return True

    @property
    def needs_cross(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        factor, damping = inverse_factor(problem, self.damping)
        weight = problem.weight.T.clone(memory_format=torch.contiguous_format)  # (in, out)
        if problem.cross is None:
            coupling = coupling_of(factor)
        else:
            less = self._handed_on(problem.cross, problem.hessian, factor).neg_()  # I - P above the diagonal
            weight = torch.linalg.solve_triangular(less.mT, weight, upper=False, unitriangular=True).contiguous()
            coupling = coupling_of(factor)
            coupling = torch.linalg.solve_triangular(
                less, coupling.triu_(1), upper=True, left=False, unitriangular=True
            )
        refit = None if self.static_groups else grid
        values = feed_back(weight, coupling.contiguous(), grid.columns(), self.block_size, refit)
        return answer_on(grid, values, self.damping, damping)

    def _handed_on(self, cross: Tensor, hessian: Tensor, factor: Tensor) -> Tensor:
        """P (in, in), strictly upper triangular: what column j hands to each later column, per unit of its weight."""
        cross = cross * (hessian.diagonal() > 0)  # nothing is in common with an input that is zero
        return ((cross @ factor.mT).triu_(1) @ factor).mul_(self.alpha)

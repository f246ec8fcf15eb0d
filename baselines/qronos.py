"""Qronos (Zhang et al., 2025, https://arxiv.org/abs/2505.11695): the first column corrects, all others then adapt to it.

Sought is the W^ on the grid that comes nearest to the outputs in the unquantized model, W X, on the inputs X^ that the
quantized blocks before leave. With H = X^ X^^T, G = X X^^T = C + H (C the cross moment) and columns in the order of
decreasing H_jj, the first column takes its best value for the others as they are, and is rounded to q_1; then all others,
together, take their best values for q_1:

    v_1 = (w G_1 - sum_{k > 1} w_k H_k1) / H_11,    v_R = (w (G + l I)_R - q_1 H_1R) S,    S = ((H + l I)_RR)^-1.

From there it is GPTQ's diffusion of errors, with the factor of S.

**On the shared pass.** In terms of C: v_1 = w_1 + (w C)_1 / H_11 and v_R = w_R + (w C)_R S - (q_1 - w_1) K_1R, where K is
GPTQ's coupling, -U_jk / U_jj with H^-1 = U^T U, and S = U_RR^T U_RR. GPTQ's pass subtracts K_1R times the change of the
first column from v_1, not from w_1. So it is run on v_1 and w_R + (w C)_R S - (v_1 - w_1) K_1R.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines.gptq import answer_on, coupling_of, feed_back
from quantease.act_order import ActOrder
from quantease.cholesky import inverse_factor
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale
from quantease.outliers import largest_eigenvalue


@dataclass(frozen=True)
class Qronos(LayerSolver):
    """The method of the paper; without a cross moment, or where nothing was lost, it is GPTQ with the same damping.

    As in the authors' code (Brevitas), grids are fitted to the original weights, those of groups too. Weights of dead
    inputs are not set to zero, as they are there, but rounded to nearest.

    Attributes:
        damping: l, as a fraction of the largest eigenvalue of the Hessian, estimated by power iteration. Where the
            factorization fails it is raised step by step, and recorded as a fraction of the mean diagonal. (The
            authors' code then leaves the layer as it is.)
        block_size: columns per matrix product: changes the speed, not the result.
        act_order: sort the columns by decreasing Hessian diagonal, as published; their groups stay those of the layer.
    """

    damping: float = 1e-6
    block_size: int = 128
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, not {self.damping}")
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
        if self.act_order:
            return ActOrder(replace(self, act_order=False)).solve(problem, spec)
        grid = problem.fit_grid(spec)
        asked = self._fraction_of_mean(problem.hessian)
        factor, damping = inverse_factor(problem, asked)
        weight = problem.weight.T.clone(memory_format=torch.contiguous_format)  # (in, out)
        lost = _lost(problem, factor)
        coupling = coupling_of(factor)
        if lost is not None:
            weight += lost
            weight[1:].addr_(coupling[0, 1:], lost[0], alpha=-1)
        values = feed_back(weight, coupling, grid.columns(), self.block_size)
        return answer_on(grid, values, asked, damping)

    def _fraction_of_mean(self, hessian: Tensor) -> float:
        """The damping as a fraction of the mean diagonal of the inputs that are not dead, as `inverse_factor` takes it."""
        diagonal = hessian.diagonal()
        if not (alive := int((diagonal > 0).sum())):
            return self.damping
        return self.damping * (largest_eigenvalue(hessian) * alive / diagonal.sum()).item()


def _lost(problem: LayerProblem, factor: Tensor) -> Tensor | None:
    """(w C)_1 / H_11 for the first column, (w C)_R S for the others (in, out); None: nothing was lost."""
    if problem.cross is None:
        return None
    diagonal = problem.hessian.diagonal()
    lost = (problem.weight @ (problem.cross * (diagonal > 0))).T  # (in, out); of a dead input nothing is known
    rest = factor[1:, 1:]
    lost[1:] = rest.mT @ (rest @ lost[1:])
    lost[0] /= torch.where(diagonal[0] > 0, diagonal[0], 1.0)
    return lost

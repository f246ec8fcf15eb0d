"""Cyclic coordinate descent over the columns of a layer, in residual form.

Keep D = W - W_hat. With every other column fixed, the value of column j that minimizes ||(W - W_hat) X||^2 is

    u_j = w_hat_j + (D H)_j / H_jj,

which is Lemma 1 of the QuantEase paper (https://arxiv.org/abs/2309.01885) written with the residual. Rounding u_j to the
grid gives the best feasible column, and D_j changes by the same step. D H is needed for one block of columns at a time:
one matrix product a block, and nothing else has to be kept up to date. The order of the updates is the paper's, so the
size of a block changes the speed and not the result.

Everything here is in the transposed layout (in, out), in which a column of the layer is contiguous.
"""

import torch
from torch import Tensor

from quantease.grid import Grid
from quantease.kernels import run_block
from quantease.layer import LayerProblem

CPU_BLOCK = 128  # columns between two matrix products
CUDA_BLOCK = 512


def sweep(w_hat: Tensor, residual: Tensor, hessian: Tensor, grid: Grid | None, watch: "Watch | None" = None) -> None:
    """One pass over the columns of `w_hat`, in place; `grid` None leaves the values unrounded (a relaxed sweep).

    Args:
        w_hat: (in, out), the current solution.
        residual: (in, out), W - W_hat; kept up to date in place.
        hessian: (in, in), with a positive diagonal.
        grid: the grid to round to.
        watch: is told whether any value changes.
    """
    curvature = hessian.diagonal().contiguous()
    columns = grid.columns() if grid else None
    block = CUDA_BLOCK if w_hat.is_cuda else CPU_BLOCK
    for start in range(0, len(w_hat), block):
        here = slice(start, min(start + block, len(w_hat)))
        work = hessian[here] @ residual  # (block, out), D H for these columns
        run_block(w_hat[here], work, hessian[here, here], columns[here] if columns else None, curvature[here])
        residual[here] -= work  # which now holds the steps
        if watch:
            watch.moved |= work.any()
    if watch:
        watch.next_sweep()


class Watch:
    """Whether sweeps still change anything.

    On a GPU the answer is that of the sweep before the last, so that it has a sweep to do while the answer travels.
    """

    def __init__(self, device: torch.device) -> None:
        self.moved = torch.zeros((), dtype=torch.bool, device=device)
        self._answers: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def next_sweep(self) -> None:
        """End a sweep."""
        event = torch.cuda.Event() if self.moved.is_cuda else None
        answer = torch.empty((), dtype=torch.bool, pin_memory=event is not None)
        answer.copy_(self.moved, non_blocking=True)
        if event:
            event.record()
        self._answers.append((answer, event))
        self.moved.zero_()

    def settled(self) -> bool:
        """Whether a sweep changed nothing; then none of the rest would."""
        lag = 2 if self.moved.is_cuda else 1
        if len(self._answers) < lag:
            return False
        answer, event = self._answers[-lag]
        if event:
            event.synchronize()
        return not answer


def revived_hessian(problem: LayerProblem) -> Tensor:
    """The Hessian; a copy in which inputs that are always zero have unit curvature, if there are any.

    Such a column cannot change the output, so every solver then rounds it to nearest.
    """
    if not problem.dead_columns:
        return problem.hessian
    hessian = problem.hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    return hessian

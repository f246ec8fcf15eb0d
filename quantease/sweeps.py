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
from quantease.matmul import product, split

CPU_BLOCK = 64  # columns between two matrix products
CUDA_BLOCK = 512
SPLIT_SIZE = 2**23  # weights from which on a layer's products are worth splitting


class Residual:
    """D = W - W_hat (in, out), in the form that its products with the Hessian are made in.

    On a GPU, for large layers, as the sum of two bfloat16 matrices, of which three products on the tensor cores give all
    but the last bits of the float32 one (see `hessian_product`). TF32 will not do: D is the small rest of large numbers,
    and its products with an ill-conditioned Hessian are the small rest of larger ones.
    """

    def __init__(self, target: Tensor, w_hat: Tensor) -> None:
        dtypes = [torch.bfloat16] * 2 if _worth_splitting(w_hat) else [w_hat.dtype]
        self._parts = [torch.empty(w_hat.shape, dtype=dtype, device=w_hat.device) for dtype in dtypes]
        self.update(target, w_hat)

    @property
    def splits(self) -> bool:
        return len(self._parts) > 1

    def update(self, target: Tensor, w_hat: Tensor, columns: slice = slice(None)) -> None:
        """Make it W - W_hat again in some columns of the layer, some at a time, as what is made on the way takes memory."""
        start, stop, _ = columns.indices(len(w_hat))
        for first in range(start, stop, CUDA_BLOCK):
            here = slice(first, min(first + CUDA_BLOCK, stop))
            difference = target[here] - w_hat[here]
            for part, rest in zip(self._parts, split(difference) if self.splits else [difference], strict=True):
                part[here] = rest

    def hessian_product(self, hessian: Tensor) -> Tensor:
        """H D for some rows of H (rows, in): float32 (rows, out).

        Of (H1 + H2) (D1 + D2) only H2 D2 is left out: 2^-16 of the whole.
        """
        if not self.splits:
            return hessian @ self._parts[0]
        (h_large, h_small), (d_large, d_small) = split(hessian), self._parts
        return product(h_large, d_large).add_(product(h_small, d_large)).add_(product(h_large, d_small))


def _worth_splitting(w_hat: Tensor) -> bool:
    return w_hat.is_cuda and w_hat.dtype == torch.float32 and w_hat.numel() >= SPLIT_SIZE


def sweep(
    w_hat: Tensor,
    target: Tensor,
    residual: Residual,
    hessian: Tensor,
    grid: Grid | None,
    convergence: "Convergence | None" = None,
) -> None:
    """One pass over the columns of `w_hat`, in place; `grid` None leaves the values unrounded (a relaxed sweep).

    Args:
        w_hat: (in, out), the current solution.
        target: (in, out), W, or what else is to be approximated.
        residual: W - W_hat; kept up to date.
        hessian: (in, in), with a positive diagonal.
        grid: the grid to round to.
        convergence: is told whether any value changes.
    """
    curvature = hessian.diagonal().contiguous()
    columns = grid.columns() if grid else None
    block = CUDA_BLOCK if w_hat.is_cuda else CPU_BLOCK
    for start in range(0, len(w_hat), block):
        here = slice(start, min(start + block, len(w_hat)))
        work = residual.hessian_product(hessian[here])  # (block, out), D H for these columns
        run_block(w_hat[here], work, hessian[here, here], columns[here] if columns else None, curvature[here])
        residual.update(target, w_hat, here)
        if convergence:
            convergence.changed |= work.any()  # which now holds the steps
    if convergence:
        convergence.end_sweep()


class Convergence:
    """Whether sweeps still change anything.

    On a GPU the answer is that of the sweep before the last, so that it has a sweep to do while the answer travels.
    """

    def __init__(self, device: torch.device) -> None:
        self.changed = torch.zeros((), dtype=torch.bool, device=device)
        self._answers: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def end_sweep(self) -> None:
        """End a sweep."""
        event = torch.cuda.Event() if self.changed.is_cuda else None
        answer = torch.empty((), dtype=torch.bool, pin_memory=event is not None)
        answer.copy_(self.changed, non_blocking=True)
        if event:
            event.record()
        self._answers.append((answer, event))
        self.changed.zero_()

    def reached(self) -> bool:
        """Whether a sweep changed nothing; then none of the rest would."""
        lag = 2 if self.changed.is_cuda else 1
        if len(self._answers) < lag:
            return False
        answer, event = self._answers[-lag]
        if event:
            event.synchronize()
        return not answer


def hessian_with_positive_diagonal(problem: LayerProblem) -> Tensor:
    """The Hessian; a copy in which inputs that are always zero have unit curvature, if there are any.

    Such a column cannot change the output, so every solver then rounds it to nearest.
    """
    if not problem.dead_columns:
        return problem.hessian
    hessian = problem.hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    return hessian

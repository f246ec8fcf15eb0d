"""Cyclic coordinate descent over the columns of a layer, in residual form.

Keep D = W - W_hat. With every other column fixed, the value of column j that minimizes ||(W - W_hat) X||^2 is

    u_j = w_hat_j + (D H)_j / H_jj,

which is Lemma 1 of the QuantEase paper (https://arxiv.org/abs/2309.01885) written with the residual. (Setting the
derivative of tr(D H D^T) with respect to column j to zero gives (D H)_j = 0, and moving the column by d changes (D H)_j by
-d H_jj.) Rounding u_j to the grid gives the best feasible column, and D_j changes by the same step.

D H is needed for one column block at a time: one matrix product per column block, and nothing else has to be kept up to
date. Inside a block the steps are propagated column by column (quantease/kernels). The order of the updates is the
paper's, so the size of a column block changes the speed and not the result. The authors' release keeps W H and W_hat H
instead and makes a matrix-vector product per column.

Everything here is in the transposed layout (in, out), in which a column of the layer is contiguous. As H is symmetric,
(D H)^T is H D^T: the products below have H on the left.
"""

from typing import Protocol

import torch
from torch import Tensor

from quantease.kernels import Columns, run_block
from quantease.matmul import product, split

# Columns of a column block, that is between two matrix products. More columns make the products more efficient and the
# pass over the block, whose work grows with the square of the block, slower.
CPU_BLOCK = 64  # 64 rows of it are 16 KiB, which stay in the first-level cache together with their values
CUDA_BLOCK = 512  # a GPU needs taller products to be busy; the kernel divides it further (quantease/kernels/cuda.py)
SPLIT_SIZE = 2**23  # weights from which on products are split: smaller layers wait for the passes, not for the products


class HasColumns(Protocol):
    """What a sweep asks of a grid."""

    def columns(self) -> Columns:
        """What rounding needs, column by column."""
        ...


class Residual:
    """D = W - W_hat (in, out), in the form that its products with the Hessian are made in.

    On a GPU, for large layers, as the sum of two bfloat16 matrices, of which three products on the tensor cores give all
    but the last bits of the float32 one (see `hessian_product`). TF32 will not do: D is the small rest of large numbers,
    and its products with an ill-conditioned Hessian are the small rest of larger ones. (TF32 keeps 10 bits of a factor,
    the two halves 16.)

    The split form is kept, and not made for each product: D changes in one column block at a time, and is read whole for
    each of them. W and W_hat remain in float32, so rounding D does not accumulate over the sweeps.
    """

    def __init__(self, target: Tensor, w_hat: Tensor) -> None:
        dtypes = [torch.bfloat16] * 2 if _worth_splitting(w_hat) else [w_hat.dtype]
        self._parts = [torch.empty(w_hat.shape, dtype=dtype, device=w_hat.device) for dtype in dtypes]
        self.update(target, w_hat)

    @property
    def splits(self) -> bool:
        """Whether products are made of bfloat16 halves."""
        return len(self._parts) > 1

    def update(self, target: Tensor, w_hat: Tensor, columns: slice = slice(None)) -> None:
        """Make it W - W_hat again in some columns of the layer; in pieces, so that the differences take little memory."""
        start, stop, _ = columns.indices(len(w_hat))
        for first in range(start, stop, CUDA_BLOCK):
            here = slice(first, min(first + CUDA_BLOCK, stop))
            difference = target[here] - w_hat[here]
            for part, rest in zip(self._parts, split(difference) if self.splits else [difference], strict=True):
                part[here] = rest

    def hessian_product(self, hessian: Tensor) -> Tensor:
        """H D for some rows of H (rows, in): (rows, out), in the precision of the weights.

        H D is minus half the gradient of the objective with respect to W_hat. In the split form it is
        (H1 + H2) (D1 + D2) without H2 D2, which is 2^-16 of the whole: each small part is at most 2^-8 of its large one.
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
    grid: HasColumns | None,
    convergence: "Convergence | None" = None,
) -> None:
    """One pass over the columns of `w_hat`, in place; `grid` None leaves the values unrounded (a relaxed sweep).

    Args:
        w_hat: (in, out), the current solution.
        target: (in, out), W, or what else is to be approximated.
        residual: W - W_hat; kept up to date.
        hessian: (in, in), with a positive diagonal.
        grid: the grid to round to.
        convergence: records whether any value changes; only rounded sweeps can stop changing values.
    """
    curvature = hessian.diagonal().contiguous()  # (in,), H_jj; contiguous, as kernels read it by address
    columns = grid.columns() if grid else None
    block = CUDA_BLOCK if w_hat.is_cuda else CPU_BLOCK
    for start in range(0, len(w_hat), block):
        here = slice(start, min(start + block, len(w_hat)))
        work = residual.hessian_product(hessian[here])  # (block, out), D H for these columns, before any of them moves
        # The residual's change by the columns inside the block reaches work through their own part of H, the coupling.
        run_block(w_hat[here], work, hessian[here, here], columns[here] if columns else None, curvature[here])
        residual.update(target, w_hat, here)
        if convergence:
            convergence.changed |= work.any()  # work now holds the steps; stays on the device: no synchronization
    if convergence:
        convergence.end_sweep()


class Convergence:
    """Whether sweeps still change anything.

    A rounded sweep that changes no value leaves the residual as it is, so the next one would change none either: an exact
    criterion, with no tolerance. On a GPU the answer is that of the sweep before the last, so that the host can queue
    another sweep while the answer travels: a host that waits for every sweep would leave the GPU idle in between.
    """

    def __init__(self, device: torch.device) -> None:
        self.changed = torch.zeros((), dtype=torch.bool, device=device)
        self._answers: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def end_sweep(self) -> None:
        """Send what is known of the sweep that ends here to the host, and start over for the next one."""
        event = torch.cuda.Event() if self.changed.is_cuda else None
        answer = torch.empty((), dtype=torch.bool, pin_memory=event is not None)  # pinned: a copy that does not block
        answer.copy_(self.changed, non_blocking=True)
        if event:
            event.record()
        self._answers.append((answer, event))
        self.changed.zero_()

    def reached(self) -> bool:
        """Whether a sweep changed nothing, so that none of the rest would."""
        lag = 2 if self.changed.is_cuda else 1
        if len(self._answers) < lag:
            return False
        answer, event = self._answers[-lag]
        if event:
            event.synchronize()
        return not answer


def hessian_with_positive_diagonal(hessian: Tensor) -> Tensor:
    """The Hessian; a copy in which dead inputs (always zero) have unit curvature, if there are any.

    H_jj is divided by. The row and column of a dead input are zero otherwise, so with H_jj = 1 its (D H)_j is D_j, its
    u_j is w_j itself, and it is rounded to nearest without any effect on other columns. Any positive number would do.
    """
    if hessian.diagonal().all():
        return hessian
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    return hessian

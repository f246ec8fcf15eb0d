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

BLOCK = 64  # columns between two matrix products


def sweep(w_hat: Tensor, residual: Tensor, hessian: Tensor, grid: Grid | None) -> Tensor:
    """One pass over the columns of `w_hat`, in place; `grid` None leaves the values unrounded (a relaxed sweep).

    Args:
        w_hat: (in, out), the current solution.
        residual: (in, out), W - W_hat; kept up to date in place.
        hessian: (in, in), with a positive diagonal.
        grid: the grid to round to.

    Returns:
        Whether any value has changed, as a tensor, so that only those who ask wait for it.
    """
    moved = torch.zeros((), dtype=torch.bool, device=w_hat.device)
    curvature = hessian.diagonal().tolist()
    for start in range(0, len(w_hat), BLOCK):
        stop = min(start + BLOCK, len(w_hat))
        before = w_hat[start:stop].clone()
        pull = hessian[start:stop] @ residual  # (block, out), D H for these columns
        _descend(w_hat[start:stop], pull, hessian[start:stop, start:stop], curvature[start:stop], grid, start)
        residual[start:stop] += before.sub_(w_hat[start:stop])
        moved |= before.any()
    return moved


def _descend(
    w_hat: Tensor, pull: Tensor, hessian: Tensor, curvature: list[float], grid: Grid | None, start: int
) -> None:
    """Update the columns of one block in order; `pull` is brought up to date for the columns still to come."""
    columns = grid.columns(start, start + len(w_hat)) if grid else None
    values, pulls, couplings = (
        w_hat.unbind(),
        pull.unbind(),
        hessian.unbind(),
    )  # views: indexing costs as much as the work
    for j, scale in enumerate(curvature):
        new = values[j].add(pulls[j], alpha=1 / scale)
        if columns:
            columns.round_(new, j)
        step = new - values[j]
        values[j].copy_(new)
        pull[j + 1 :].addr_(couplings[j][j + 1 :], step, alpha=-1)

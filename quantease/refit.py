"""Scales and zero points that are best for given codes: beyond the paper, which fits the grid once.

With the codes q of one row and group held, its values are s q - t with the scale s and t = s z, so the error is
quadratic in (s, t) and their best values solve a 2 x 2 system. Groups are taken in turn, each given the others, as
columns are in a sweep.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantease.grid import Grid, storable
from quantease.sweeps import Residual

ZERO_BITS = 16  # a fractional zero point is stored in float16


def refit(w_hat: Tensor, target: Tensor, residual: Residual, hessian: Tensor, grid: Grid) -> Grid:
    """Solve the scale and zero point of every row and group; no row's error rises.

    Args:
        w_hat: (in, out), values on `grid`; moved to the new grid in place, at the same codes.
        target: (in, out), W.
        residual: W - W_hat; kept up to date.
        hessian: (in, in).
        grid: with the present scales; symmetric grids keep their zero points.

    Returns:
        The new grid. Unless it is symmetric, its zero points are fractional.
    """
    scale, zero = grid.scale.clone(), grid.zero.clone()
    for group in range(scale.shape[1]):
        rows = (grid.group == group).nonzero().flatten()
        pull = residual.hessian_product(hessian[rows])  # (columns of the group, out)
        within = hessian[rows][:, rows]
        centered = torch.round(w_hat[rows] / scale[:, group] + zero[:, group]) - zero[:, group]  # code - zero
        new_scale, new_zero = _solve(centered, pull, within, scale[:, group], zero[:, group], grid)
        step = new_scale * (centered + (zero[:, group] - new_zero)) - w_hat[rows]
        change = (step * (within @ step - 2 * pull)).sum(0)  # of each row's error
        better = (change < 0) & (new_scale > 0)
        w_hat[rows] += step * better
        residual.update(target, w_hat, _span(rows))
        scale[:, group] = torch.where(better, new_scale, scale[:, group])
        zero[:, group] = torch.where(better, new_zero, zero[:, group])
    if grid.spec.symmetric:
        return replace(grid, scale=scale)
    bits = grid.spec.scale_bits + max(ZERO_BITS, grid.spec.scale_bits)
    return replace(grid, scale=scale, zero=zero, stored_bits_per_group=bits)


def _solve(
    centered: Tensor, pull: Tensor, within: Tensor, scale: Tensor, zero: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The best scale and zero point (out,), as they are stored, for codes minus zero points `centered` (columns, out).

    The values change by ds * centered + offset. A row whose system is singular only gets a scale.
    """
    curved = within @ centered
    a, b, c = (centered * curved).sum(0).double(), curved.sum(0).double(), within.sum().double()
    f, g = (centered * pull).sum(0).double(), pull.sum(0).double()
    determinant = a * c - b * b
    regular = determinant > 1e-6 * a * c
    if grid.spec.symmetric:
        regular = torch.zeros_like(regular)
    ds = torch.where(regular, (f * c - g * b) / determinant, f / a)
    offset = torch.where(regular, (g * a - f * b) / determinant, 0.0)
    ds, offset = ds.nan_to_num(0.0, 0.0, 0.0), offset.nan_to_num(0.0, 0.0, 0.0)
    new_scale = storable((scale + ds).clamp(min=-1.0, max=6e4).to(scale.dtype), grid.spec.scale_bits)
    new_zero = zero - (offset / new_scale).to(zero.dtype).nan_to_num(0.0, 0.0, 0.0).clamp(-6e4, 6e4)
    return new_scale, storable(new_zero, max(ZERO_BITS, grid.spec.scale_bits))


def _span(rows: Tensor) -> slice:
    """From the first to the last of them: all there is to update where a group's columns are neighbors."""
    return slice(int(rows[0]), int(rows[-1]) + 1)

"""Scales and zero points that are best for given codes. Beyond the paper, which fits the grid once and keeps it.

With the codes q of one row and grid group held, its weights are s (q - z). The error of the layer is quadratic in the
scale s and in the offset t = s z, so their best values solve a 2 x 2 system of normal equations. Groups are taken in
turn, each given the others, as columns are in a sweep: block coordinate descent with two unknowns per row and group.
"""

from dataclasses import replace

import torch
from torch import Tensor

from quantease.grids.scale_formats import float_format
from quantease.grids.uniform import UniformGrid
from quantease.sweeps import Residual

ZERO_BITS = 16  # a zero point that is solved for is fractional, so it is stored in float16 and not as a code
FLOAT16_LARGEST = (
    6e4  # float16 ends at 65,504, beyond which `storable` refuses: a useless solution is cut, not an error
)
SINGULAR = 1e-6  # of a c: less than this is left of the determinant a c - b^2 by the rounding of float32 sums alone


def refit(
    w_hat: Tensor, target: Tensor, residual: Residual, hessian: Tensor, grid: UniformGrid, zeros: bool = True
) -> UniformGrid:
    """The grid with the best scale and zero point of every row and group; no row's error rises.

    Args:
        w_hat: (in, out), values on `grid`; moved to the new grid in place, at the same codes.
        target: (in, out), W.
        residual: D = W - W_hat; kept up to date.
        hessian: (in, in). Inputs that are always zero have a zero diagonal here, so their weights have no say.
        grid: with the present scales; symmetric grids keep their zero points.
        zeros: solve the zero points, too, which are fractional then; otherwise the new grid takes no more to store.
    """
    scale, zero = grid.scale.clone(), grid.zero.clone()  # (out, groups)
    keeps_zeros = grid.spec.symmetric or not zeros
    for group in range(scale.shape[1]):
        rows = (grid.group == group).nonzero().flatten()  # the n columns of the layer in this group: rows of w_hat
        product = residual.hessian_product(hessian[rows])  # (n, out), (H D) of the group: half the downhill slope
        within = hessian[rows][:, rows]  # (n, n), the group's own block of H
        old_scale, old_zero = scale[:, group], zero[:, group]
        # The codes are read off the values: w_hat / scale + zero is whole but for rounding errors.
        centered = torch.round(w_hat[rows] / old_scale + old_zero) - old_zero  # (n, out), c = code - zero
        change, offset = _solve(centered, product, within, keeps_zeros)
        new_scale, new_zero = _as_stored(old_scale, old_zero, change, offset, grid.spec.scale_bits)
        new_zero = old_zero if keeps_zeros else new_zero
        step = new_scale * (centered + (old_zero - new_zero)) - w_hat[rows]  # (n, out), at the same codes
        # E(D - step) - E(D) per row, with E(D) = D^T H D. It is computed for the stored, rounded parameters, so that a
        # row whose gain is smaller than what float16 loses keeps its old ones.
        error_change = (step * (within @ step - 2 * product)).sum(0)
        # A scale of zero would make all codes equal, and a negative one would turn their order around: not a grid.
        better = (error_change < 0) & (new_scale > 0)
        w_hat[rows] += step * better
        residual.update(target, w_hat, _span(rows))
        scale[:, group] = torch.where(better, new_scale, old_scale)
        zero[:, group] = torch.where(better, new_zero, old_zero)
    if keeps_zeros:
        return replace(grid, scale=scale)
    bits = grid.spec.scale_bits + max(ZERO_BITS, grid.spec.scale_bits)
    return replace(grid, scale=scale, zero=zero, stored_bits_per_group=bits)


def _solve(centered: Tensor, product: Tensor, within: Tensor, keeps_zeros: bool) -> tuple[Tensor, Tensor]:
    """The best change of the scale and the best offset (out,), float64, for one group; per row.

    The values of the group change by delta = ds c + o 1, with c the centered codes and 1 a vector of ones. The error
    changes by delta^T H delta - 2 delta^T p, with H the group's block and p = (H D) of the group. Setting the derivatives
    with respect to ds and o to zero gives

        | c^T H c   1^T H c |  | ds |   | c^T p |            | a  b |  | ds |   | f |
        |                   |  |    | = |       |,    here   |      |  |    | = |   |,
        | 1^T H c   1^T H 1 |  | o  |   | 1^T p |            | b  e |  | o  |   | g |

    and Cramer's rule solves it: ds = (f e - g b) / det, o = (g a - f b) / det, det = a e - b^2.

    By Cauchy-Schwarz det >= 0, and it is zero where c is a multiple of 1 in the norm of H: all codes of the row are
    equal, or H has rank one. Then scale and offset say the same thing, so the offset stays and ds = f / a alone is
    solved; likewise where zero points are kept, as a symmetric grid does. Where a is zero, too (all codes are the zero
    point, or all inputs of the group are dead), nothing depends on the scale, and it stays.

    Args:
        centered: (n, out), codes minus zero points.
        product: (n, out), p.
        within: (n, n), H.
    """
    curved = within @ centered  # (n, out), H c
    # In double from here on: the determinant is a difference of large products, which float32 may not even hold.
    a, b, e = (centered * curved).sum(0).double(), curved.sum(0).double(), within.sum().double()
    f, g = (centered * product).sum(0).double(), product.sum(0).double()
    determinant = a * e - b * b
    regular = determinant > SINGULAR * a * e  # relative, so that the Hessian's scale does not matter
    if keeps_zeros:
        regular = torch.zeros_like(regular)
    change = torch.where(regular, (f * e - g * b) / determinant, f / a)
    offset = torch.where(regular, (g * a - f * b) / determinant, 0.0)
    return change.nan_to_num(0.0, 0.0, 0.0), offset.nan_to_num(0.0, 0.0, 0.0)  # 0 / 0 and f / 0: no change


def _as_stored(scale: Tensor, zero: Tensor, change: Tensor, offset: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The new scale and zero point (out,), as they are stored.

    s' = s + ds, and s' (c + z - z') = s' c + o gives z' = z - o / s'. The scale is rounded first, so that the zero point
    makes up for what its rounding loses of the offset. Scales that came out far below zero are cut to -1: finite in
    float16 and still negative, by which the caller knows to refuse them.
    """
    new_scale = float_format(bits).storable((scale + change).clamp(min=-1.0, max=FLOAT16_LARGEST).to(scale.dtype))
    # o / 0 is infinite or not a number, and such a row is refused for its scale: any finite zero point will do.
    shift = (offset / new_scale).to(zero.dtype).nan_to_num(0.0, 0.0, 0.0)
    new_zero = (zero - shift).clamp(-FLOAT16_LARGEST, FLOAT16_LARGEST)  # the sum: a zero point may be far out already
    return new_scale, float_format(max(ZERO_BITS, bits)).storable(new_zero)


def _span(rows: Tensor) -> slice:
    """From the first to the last of them: all that has to be updated where the columns of a group are neighbors.

    With act-order they are scattered, and the span is wider than it need be: right, but slower.
    """
    return slice(int(rows[0]), int(rows[-1]) + 1)

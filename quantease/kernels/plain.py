"""The pass over a block, column by column in torch: the definition that the fast forms are held to."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantease.kernels import Columns


def run_block(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: "Columns | None",
    curvature: Tensor | None,
    limit: Tensor | None,
) -> None:
    """See `quantease.kernels.run_block`."""
    for j in range(len(values)):
        # A clone, as work[j] is overwritten below.
        target = work[j].clone() if curvature is None else values[j] + work[j] / curvature[j]
        new = target if columns is None else round_column(target, columns, j)
        if limit is not None:
            new = torch.where((target - new).square() > limit[j], target, new)
        change = new - (target if curvature is None else values[j])
        work[j + 1 :].addr_(coupling[j, j + 1 :], change, alpha=-1)
        values[j], work[j] = new, change  # the solvers read the changes off for the columns after this block


def round_column(target: Tensor, columns: "Columns", j: int) -> Tensor:
    """The nearest grid points to `target` (out,) for column j of the block."""
    group = int(columns.group[j])
    if columns.levels is not None and columns.thresholds is not None:
        codes = nearest_level_codes(target, columns.scale[group], columns.thresholds)
        return columns.levels[codes] * columns.scale[group]
    return nearest_values(target, columns.scale[group], columns.zero[group], columns.max_code)


def nearest_values(target: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """The nearest grid points to `target`; shapes broadcast."""
    codes, fraction = _nearest(target, scale, zero, max_code)
    return (codes - fraction) * scale


def nearest_codes(target: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> Tensor:
    """The codes of the nearest grid points, uint8."""
    return (_nearest(target, scale, zero, max_code)[0] + zero.floor()).to(torch.uint8)


def nearest_level_codes(target: Tensor, scale: Tensor, thresholds: Tensor) -> Tensor:
    """The codes of the nearest levels, int64: how many thresholds `target` / `scale` exceeds; shapes broadcast."""
    return torch.bucketize((target / scale).contiguous(), thresholds)


def _nearest(target: Tensor, scale: Tensor, zero: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """The codes of the nearest grid points, less floor(zero), and zero's fraction: the value is (code - fraction) * scale.

    The textbook form is scale * (round(target / scale + zero).clamp(0, max_code) - zero). A zero point that was solved
    for (quantease/refit.py) is fractional and can be in the thousands where the range is far from zero; adding it would
    cost the last bits of target / scale. So only its fraction is added, and its whole part moves into the bounds of the
    clamp. For whole zero points the two are the same to the last bit, but for ties: `round` goes to the even number, and
    here it is code - zero that becomes even.
    """
    lowest = zero.floor()
    fraction = zero - lowest
    return torch.round(target / scale + fraction).clamp_(-lowest, max_code - lowest), fraction

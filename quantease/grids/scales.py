"""How the scale and zero point of a group of the uniform grid are found from its weights."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantease.kernels.plain import nearest_values

if TYPE_CHECKING:
    from quantease.grid import GridSpec

SHRINKS = [
    1 - step / 100 for step in range(80)
]  # 1, 0.99, ... 0.21 of the range: grid=100, maxshrink=0.8 of GPTQ's code
MSE_NORM = (
    2.4  # the power of the rounding error that GPTQ's code sums: between 2, the mean square, and the largest error
)


def fit_range(grouped: Tensor, spec: "GridSpec", shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point (out, groups) over `shrink` times the range of the weights (out, groups, group_size).

    The range always contains zero, so that zero is one of the grid's values: pruned weights and padding stay zero.
    """
    low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = spec.scale_format.storable((high - low) / spec.max_code).clamp(min=spec.scale_format.smallest)
    scale = torch.where(low == high, 1.0, scale)  # an all-zero group: any positive scale represents it
    middle = torch.full_like(scale, (spec.max_code + 1) / 2)
    # The zero point is found from the scale as it is stored, so that it is right for the grid that is used. The clamp
    # matters where rounding the scale to float16 has made it so small that -low / scale exceeds the largest code.
    return scale, middle if spec.symmetric else torch.round(-low / scale).clamp(0, spec.max_code)


def least_error_range(
    values: Tensor, max_code: int, fit: Callable[[float], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the shrunken range with the least rounding error along the last dimension of `values`.

    The search of GPTQ's authors' code (https://arxiv.org/abs/2210.17323, option `mse`): cutting off a few large weights
    makes the step finer for all others.

    Args:
        fit: gives scale and zero point, of the shape of `values` less its last dimension, for a part of the range.
    """
    scale, zero = fit(1.0)
    least = torch.full_like(scale, torch.inf)
    for shrink in SHRINKS:
        trial_scale, trial_zero = fit(shrink)
        rounded = nearest_values(values, trial_scale[..., None], trial_zero[..., None], max_code)
        error = (rounded - values).abs_().pow_(MSE_NORM).sum(-1)
        better = error < least  # strictly: of equal ranges the widest is kept
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, trial_scale, scale), torch.where(better, trial_zero, zero)
    return scale, zero

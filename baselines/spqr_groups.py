"""The first-level groups of SpQR (https://arxiv.org/abs/2306.03078, Section 4): outliers, ranges, statistics.

A group is `group_size` columns of each row. Everything is written for all rows at once: `group` is (out, n).
"""

import math

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.kernels.plain import nearest_values


def weight_range(values: Tensor, spec: GridSpec, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and (fractional) zero point of `shrink` times the range of `values` along the last dimension.

    Unlike the shared grid's, the range of an asymmetric one need not contain zero, as in the authors' code: in a group of
    16 weights all may have one sign, and the range is then much shorter.
    """
    low, high = values.amin(-1) * shrink, values.amax(-1) * shrink
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    # A range without length has one value, which must be represented: with scale |low| it is one step from zero.
    constant = low == high
    scale = torch.where(constant, low.abs(), (high - low) / spec.max_code)
    scale = torch.where(scale == 0, 1.0, scale)  # all zeros: any positive scale represents them
    return scale, torch.full_like(scale, (spec.max_code + 1) / 2) if spec.symmetric else -low / scale


def quantize_statistics(values: Tensor, bits: int, group_size: int, second_bits: int = 16) -> Tensor:
    """Scales or zero points `values` (out,) of one group of columns, as the second level stores them.

    `group_size` consecutive rows share a scale and a minimum of `second_bits` bits each, 16 (float16) or 32; each value is
    a code of `bits` bits.
    """
    missing = -len(values) % group_size  # of the last group: filled with its last value, which changes no range
    groups = torch.cat([values, values[-1:].expand(missing)]).view(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    if second_bits == 16:  # the minimum after the step is found, so that the step is that of the true range
        step, low = step.half().to(values.dtype), low.half().to(values.dtype)
    codes = torch.round((groups - low) / torch.where(step > 0, step, 1.0)).clamp(0, 2**bits - 1)
    return (low + step * codes).flatten()[: len(values)]


def without_outliers(group: Tensor, pivot: Tensor, limit: float, spec: GridSpec) -> Tensor:
    """The group (out, n) with its likely outliers replaced by the mean of the other weights of their row.

    The range that is fitted to the result is that of the other weights (Algorithm 1, leave-one-out):
    weight i is a likely outlier if the error of its row falls by more than `limit` when the range is fitted without it,

        E(w) - E(w without i) > limit,    E(w) = sum_k ((q(w_k) - w_k) / U_kk)^2 with q fitted to the range of w.

    Whether a weight is kept in high precision is decided later, after it was compensated: this is only about the range.

    Args:
        group: (out, n), compensated so far.
        pivot: (n,), the diagonal U_kk of the factor of the inverse Hessian: 1 / U_kk^2 is what an error in column k costs.
        limit: infinite where no outliers are wanted.
    """
    count = group.shape[1]
    if not math.isfinite(limit) or count == 1:  # a group of one weight has nothing left to fit a range to
        return group
    # others[i] are the column numbers 0 to n - 1 without i: below i they are themselves, from i on one is added.
    left_out = torch.arange(count, device=group.device)[:, None]  # (n, 1)
    others = torch.arange(count - 1, device=group.device)  # (n - 1,)
    others = others + (others >= left_out)  # (n, n - 1)
    # One gather makes all n groups of n - 1 weights of all rows, (out, n, n - 1), whose errors are (out, n).
    error_without = _error(group[:, others], pivot[others], spec)
    error_with = _error(group, pivot, spec)[:, None]  # (out, 1)
    inlier = (error_with - error_without <= limit).to(group.dtype)  # (out, n), 1 or 0
    # The mean lies within the range of the inliers, so the replaced weights do not widen it. Where all n weights are
    # likely outliers the mean is 0 / 1, and the group becomes one of zeros.
    mean = (group * inlier).sum(1, keepdim=True) / inlier.sum(1, keepdim=True).clamp(min=1)
    return group * inlier + mean * (1 - inlier)


def _error(values: Tensor, pivot: Tensor, spec: GridSpec) -> Tensor:
    """E of `without_outliers` along the last dimension of `values`, (out, n) to (out,) or (out, n, n - 1) to (out, n)."""
    scale, zero = (statistic[..., None] for statistic in weight_range(values, spec))
    return ((nearest_values(values, scale, zero, spec.max_code) - values) / pivot).square().sum(-1)

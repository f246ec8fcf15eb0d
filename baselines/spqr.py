"""SpQR (Dettmers et al., 2023, https://arxiv.org/abs/2306.03078), Algorithm 1, with its authors' code where that says more.

GPTQ on very small groups whose scales and zero points are themselves quantized in second-level groups, and with the
weights that would cost most to quantize kept in 16 bits. Average bits of a weight, Section 4.3 of the paper:
b + (b_scale + b_zero) / g + 64 / (g g2) + 32 r, where r is the share of outliers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines.spqr_groups import quantize_statistics, weight_range, without_outliers
from quantease.act_order import ActOrder
from quantease.cholesky import damping_notes, inverse_factor
from quantease.grid import GridSpec
from quantease.grids.scale_formats import float_format
from quantease.grids.scales import least_error_range
from quantease.grids.uniform import UniformGrid
from quantease.kernels import Columns, run_block
from quantease.kernels.plain import nearest_codes, nearest_values
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from quantease.normal_scale import at_normal_scale
from quantease.sparse import Outliers

SMALLEST = 1e-9  # takes the place of a scale that the second level rounds to zero (in the authors' code, too)
# The threshold that gives a wanted share of outliers is found between 1e-6 and 1e6 by bisection of its logarithm. Each
# step solves the layer again; 16 of them leave a factor of 1.0004, mostly it ends sooner.
LOWEST, HIGHEST = 1e-6, 1e6
BISECTIONS = 16
NEAR_ENOUGH = 0.02  # of the wanted share: 0.98 % for 1 %, which is 0.0064 bits per weight


@dataclass(frozen=True)
class SpQR(LayerSolver):
    """Algorithm 1. The bits of a code are the run's, and so is the group size where the run sets one.

    Symmetric grids and shrunken (mse) ranges, which the paper does not have, are there to be compared on equal terms.

    Attributes:
        group_size: columns of a first-level group, where the run leaves that open.
        scale_bits: bits of a first-level scale.
        zero_bits: bits of a first-level zero point.
        second_group_size: rows whose first-level scales (and zero points) are quantized together.
        threshold: keep a weight if that lowers the squared error by more than this times the mean over all columns of
            var(w) / [H^-1 factor]^2.
        outlier_ratio: the share of outliers to hit, by bisection on the threshold; None: take the threshold as it is.
        damping: fraction of the mean Hessian diagonal that is added to the diagonal, raised as in GPTQ.
        act_order: sort the columns by decreasing Hessian diagonal, and group them in that order.
    """

    group_size: int = 16
    scale_bits: int = 3
    zero_bits: int = 3
    second_group_size: int = 16
    threshold: float = 0.2
    outlier_ratio: float | None = None
    damping: float = 1.0
    act_order: bool = True

    def __post_init__(self) -> None:
        for name in ("group_size", "scale_bits", "zero_bits", "second_group_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.threshold <= 0 or self.damping < 0:
            raise ValueError("threshold must be positive, and damping must not be negative")
        if self.outlier_ratio is not None and not 0 <= self.outlier_ratio < 1:
            raise ValueError(f"outlier_ratio must lie in 0 to 1, or be null, not {self.outlier_ratio}")

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        if spec.format is not None:
            raise Unsupported(
                f"SpQR quantizes its scales and zero points itself, and {spec.format.name} has its own: take grid=int"
            )
        if self.act_order:
            return ActOrder(replace(self, act_order=False)).solve(problem, spec)
        factor, damping = inverse_factor(problem, self.damping)  # U, upper triangular, H^-1 = U^T U
        alive = problem.hessian.diagonal() > 0
        pivot = factor.diagonal().clone()  # (in,), U_jj
        coupling = factor.div_(-pivot[:, None])  # in place, the layer's largest matrix; signs as in baselines/gptq.py
        cost = _mean_cost(problem.weight, pivot, alive)

        def solve(threshold: float) -> QuantizedLayer:
            return self._solve(problem.weight, coupling, pivot, alive, threshold * cost, spec)

        answer = (
            solve(self.threshold)
            if self.outlier_ratio is None
            else self._bisect_threshold(solve, problem.weight.numel())
        )
        notes = answer.notes + damping_notes(self.damping, damping)
        return replace(answer, damping=damping, damping_raised=damping != self.damping, notes=notes)

    def _bisect_threshold(self, solve: Callable[[float], QuantizedLayer], weights: int) -> QuantizedLayer:
        """The answer whose share of outliers is nearest to the wanted one: the higher the threshold, the fewer outliers.

        The share is not quite monotonous in the threshold, as outliers change what later columns have to make up for. So
        the best answer that was met is kept, and a share that no threshold gives is reported.
        """
        wanted = self.outlier_ratio or 0.0
        if wanted == 0:
            return solve(math.inf)
        tolerance = max(NEAR_ENOUGH * wanted, 1 / weights)  # a small layer cannot come nearer than one weight
        low, high = math.log(LOWEST), math.log(HIGHEST)
        best: QuantizedLayer | None = None
        for _ in range(BISECTIONS):
            threshold = (low + high) / 2
            answer = solve(math.exp(threshold))
            if best is None or abs(answer.outlier_ratio - wanted) < abs(best.outlier_ratio - wanted):
                best = answer
            if abs(answer.outlier_ratio - wanted) <= tolerance:
                break
            low, high = (threshold, high) if answer.outlier_ratio > wanted else (low, threshold)
        assert best is not None
        far = abs(best.outlier_ratio - wanted) > tolerance
        return replace(best, notes=(f"{best.outlier_ratio:.3%} outliers instead of {wanted:.3%}",)) if far else best

    def _solve(
        self, weight: Tensor, coupling: Tensor, pivot: Tensor, alive: Tensor, threshold: float, spec: GridSpec
    ) -> QuantizedLayer:
        """Algorithm 1: one pass over the columns, group by group.

        Args:
            weight: (out, in).
            coupling: (in, in), -U_jk / U_jj.
            pivot: (in,), U_jj.
            alive: (in,), which inputs are not dead.
            threshold: a weight is an outlier if (w - q(w))^2 / U_jj^2 exceeds it.
        """
        group_size = min(spec.group_size or self.group_size, weight.shape[1])
        # Per column, for the squared error alone. The weights of a dead input cost nothing, so none is an outlier.
        limit = torch.where(alive, threshold * pivot.square(), torch.inf)  # (in,)
        remaining = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out), compensated as it goes
        values = torch.empty_like(remaining)
        codes, kept = torch.empty_like(remaining, dtype=torch.uint8), torch.empty_like(remaining, dtype=torch.bool)
        scales, zeros = [], []
        for start in range(0, len(remaining), group_size):
            here, later = slice(start, start + group_size), slice(start + group_size, None)
            # Groups are fitted when reached, to the weights as they have been compensated by then.
            inliers = without_outliers(remaining[here].T, pivot[here], threshold, spec)
            scale, zero = self._fit(inliers, spec)
            group = torch.zeros(len(remaining[here]), dtype=torch.int32, device=weight.device)
            columns = Columns(scale[None], zero[None], group, spec.max_code)
            # A weight whose error exceeds the limit stays as it is, and leaves nothing to compensate for.
            run_block(values[here], remaining[here], coupling[here, here], columns, limit=limit[here])
            remaining[later].addmm_(coupling[here, later].T, remaining[here], alpha=-1)
            codes[here], kept[here] = _encode(values[here], scale, zero, limit[here], spec)
            scales.append(scale)
            zeros.append(zero)
        group = torch.arange(weight.shape[1], device=weight.device) // group_size
        stored = self._bits_per_group(len(weight), spec)
        grid = UniformGrid(spec, torch.stack(scales, 1), torch.stack(zeros, 1), group, stored_bits_per_group=stored)
        return QuantizedLayer(codes.T.contiguous(), grid, _outliers(values.T, kept.T, codes.T, grid))

    def _fit(self, group: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
        """The two-level scale and zero point (out,) of the weights of one group (out, n)."""
        if spec.range == "mse":
            scale, zero = least_error_range(group, spec.max_code, lambda shrink: weight_range(group, spec, shrink))
        else:
            scale, zero = weight_range(group, spec)
        rows, second_bits = self.second_group_size, spec.scale_bits
        scale = quantize_statistics(scale, self.scale_bits, rows, second_bits).clamp(min=SMALLEST)
        return scale, zero if spec.symmetric else quantize_statistics(zero, self.zero_bits, rows, second_bits)

    def _bits_per_group(self, rows: int, spec: GridSpec) -> float:
        """What the scale and the zero point of a first-level group take, with their part of the second level."""
        second_level = 2 * spec.scale_bits * math.ceil(rows / self.second_group_size) / rows
        return self.scale_bits + second_level + (0 if spec.symmetric else self.zero_bits + second_level)


def _encode(values: Tensor, scale: Tensor, zero: Tensor, limit: Tensor, spec: GridSpec) -> tuple[Tensor, Tensor]:
    """The codes (n, out) of one group, that of zero for outliers, and which values (n, out) are outliers."""
    # A value that was rounded is equal to its own rounding, so a value that is far from it was kept.
    kept = (values - nearest_values(values, scale, zero, spec.max_code)).square() > limit[:, None]
    return nearest_codes(torch.where(kept, 0.0, values), scale, zero, spec.max_code), kept


def _outliers(values: Tensor, kept: Tensor, codes: Tensor, grid: UniformGrid) -> Outliers | None:
    """The kept weights in 16 bits (32 where scales have 32), less what their codes stand for, to which they are added.

    Zero need not be a value of SpQR's grids (their zero points are fractional), so the difference is not the weight.
    """
    rows, columns = kept.nonzero(as_tuple=True)
    if not len(rows):
        return None
    group = grid.group[columns]
    beside = grid.scale[rows, group] * (codes[rows, columns] - grid.zero[rows, group])
    kept_values = float_format(grid.spec.scale_bits).storable(values[rows, columns])
    return Outliers(rows, columns, kept_values - beside, value_bits=grid.spec.scale_bits)


def _mean_cost(weight: Tensor, pivot: Tensor, alive: Tensor) -> float:
    """The unit of the threshold: the mean of var(w_j) / U_jj^2 over all columns j that are not dead (authors' code).

    With it a threshold means the same at any scale of weights and Hessian.
    """
    # correction: the unbiased variance, except for a layer of one row, which has none.
    cost = weight.var(dim=0, correction=min(1, len(weight) - 1)) / pivot.square()
    return (cost * alive).sum().item() / max(1, int(alive.sum()))

"""The quantization grid: which values a quantized weight may take, and what it costs to store them.

Every method fits its grid here, so that methods given the same options round to the same values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.kernels import Columns
from quantease.kernels.plain import nearest_codes, nearest_values

FLOAT16_SMALLEST = 2.0**-24  # the smallest positive float16
SHRINKS = [1 - step / 100 for step in range(80)]  # of the range, that the MSE search tries (GPTQ's authors' code)
MSE_NORM = 2.4  # the power of the rounding error that it minimizes
ROWS_BYTES = 2**24  # of a float32 matrix that are encoded at once


@dataclass(frozen=True)
class GridSpec:
    """Which grid to build.

    Attributes:
        bits: bits of a code, 2 to 8.
        group_size: input columns that share a scale; None: the whole output row does (per-channel).
        symmetric: the zero point is the middle code and is not stored.
        scale_bits: 16 rounds the scales to float16, as they are stored; 32 keeps float32.
        range: `minmax` covers all weights of a group, `mse` the part of that range with the least rounding error.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    scale_bits: int = 16
    range: str = "minmax"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be a positive number of columns or null, not {self.group_size}")
        if self.scale_bits not in (16, 32):
            raise ValueError(f"scale_bits must be 16 or 32, not {self.scale_bits}")
        if self.range not in ("minmax", "mse"):
            raise ValueError(f"grid_range must be minmax or mse, not {self.range}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    @property
    def bits_per_group(self) -> float:
        """What the scale and the zero point of a group take."""
        return self.scale_bits + (0 if self.symmetric else self.bits)

    def divides(self, in_features: int) -> bool:
        """Whether a row of `in_features` columns can be cut into groups of equal size."""
        return self.group_size is None or in_features % self.group_size == 0


@dataclass(frozen=True, eq=False)
class Grid:
    """A fitted grid, `weight = scale * (code - zero)`, for each output row and group of input columns.

    Attributes:
        stored_bits_per_group: bits of the scale and zero point of a group, where they are not what the spec says.
    """

    spec: GridSpec
    scale: Tensor  # (out, groups)
    zero: Tensor  # (out, groups)
    group: Tensor  # (in,), the group that each input column belongs to
    stored_bits_per_group: float | None = None

    @classmethod
    def fit(cls, weight: Tensor, spec: GridSpec) -> "Grid":
        """The grid of `weight` (out, in); zero is always one of its values.

        Raises:
            ValueError: the group size does not divide the number of columns, or a scale exceeds float16.
        """
        out_features, in_features = weight.shape
        if not spec.divides(in_features):
            raise ValueError(f"group_size {spec.group_size} does not divide {in_features} columns")
        group_size = spec.group_size or in_features
        grouped = weight.reshape(out_features, -1, group_size)
        if spec.range == "mse":
            scale, zero = least_error(grouped, spec.max_code, lambda shrink: _fit_range(grouped, spec, shrink))
        else:
            scale, zero = _fit_range(grouped, spec, 1.0)
        group = torch.arange(in_features, device=weight.device) // group_size
        return cls(spec, scale, zero, group)

    @property
    def clipped_scales(self) -> int:
        """How many scales are as small as their format goes: most would have been smaller."""
        return int((self.scale <= _smallest(self.spec)).sum())

    def refit_group_(self, group: int, weight: Tensor) -> None:
        """Fit the scale and zero point of one group anew, in place, to the current weights of its columns (out, n)."""
        fitted = Grid.fit(weight, replace(self.spec, group_size=None))
        self.scale[:, group], self.zero[:, group] = fitted.scale[:, 0], fitted.zero[:, 0]

    def encode(self, weight: Tensor) -> Tensor:
        """The codes of the nearest grid points to `weight` (out, in), uint8."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in _row_slices(weight):
            scale, zero = self._of_rows(rows)
            codes[rows] = nearest_codes(weight[rows], scale, zero, self.spec.max_code)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The values (out, in) that `codes` stand for."""
        values = torch.empty(codes.shape, dtype=self.scale.dtype, device=codes.device)
        for rows in _row_slices(codes):
            scale, zero = self._of_rows(rows)
            torch.mul(codes[rows] - zero, scale, out=values[rows])
        return values

    def _of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scale and zero point for every column of some rows, or (rows, 1) where a row has but one."""
        scale, zero = self.scale[rows], self.zero[rows]
        return (scale, zero) if scale.shape[1] == 1 else (scale[:, self.group], zero[:, self.group])

    def columns(self) -> Columns:
        """What rounding needs, column by column, in the solvers' transposed layout."""
        group = self.group.to(torch.int32)
        return Columns(self.scale.T.contiguous(), self.zero.T.contiguous(), group, self.spec.max_code)

    def select_rows(self, rows: slice) -> "Grid":
        """The grid of some of the rows."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])

    def permuted(self, order: Tensor) -> "Grid":
        """The same grid after its input columns were put into another order."""
        return replace(self, group=self.group[order])

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes, of the scale and zero point of each group, and of the order where groups are scattered."""
        (out_features, groups), columns = self.scale.shape, len(self.group)
        stored = self.spec.bits_per_group if self.stored_bits_per_group is None else self.stored_bits_per_group
        scattered = bool((self.group.diff() < 0).any())
        return self.spec.bits + stored * groups / columns + (16 / out_features if scattered else 0)


def _row_slices(weight: Tensor) -> Iterator[slice]:
    """Rows, so many at a time that what is made from them on the way stays small."""
    step = max(1, ROWS_BYTES // (weight.shape[1] * 4))
    return (slice(start, start + step) for start in range(0, len(weight), step))


def _fit_range(grouped: Tensor, spec: GridSpec, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point (out, groups) over `shrink` times the range of the weights (out, groups, group_size)."""
    low, high = grouped.amin(-1).clamp(max=0) * shrink, grouped.amax(-1).clamp(min=0) * shrink
    if spec.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = storable((high - low) / spec.max_code, spec.scale_bits).clamp(min=_smallest(spec))
    scale = torch.where(low == high, 1.0, scale)  # an all-zero group: any positive scale represents it
    middle = torch.full_like(scale, (spec.max_code + 1) / 2)
    return scale, middle if spec.symmetric else torch.round(-low / scale).clamp(0, spec.max_code)


def least_error(values: Tensor, max_code: int, fit: Callable[[float], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the shrunken range with the least rounding error along the last dimension of `values`.

    Args:
        fit: gives scale and zero point, of the shape of `values` less that dimension, for a part of the range.
    """
    scale, zero = fit(1.0)
    least = torch.full_like(scale, torch.inf)
    for shrink in SHRINKS:
        trial_scale, trial_zero = fit(shrink)
        rounded = nearest_values(values, trial_scale[..., None], trial_zero[..., None], max_code)
        error = (rounded - values).abs_().pow_(MSE_NORM).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, trial_scale, scale), torch.where(better, trial_zero, zero)
    return scale, zero


def _smallest(spec: GridSpec) -> float:
    return FLOAT16_SMALLEST if spec.scale_bits == 16 else torch.finfo(torch.float32).tiny


def storable(values: Tensor, bits: int) -> Tensor:
    """`values` as they are stored in `bits` bits, 16 (float16) or 32.

    Raises:
        ValueError: a value is not finite, or too large for float16.
    """
    stored = values.half().to(values.dtype) if bits == 16 else values
    if not torch.isfinite(stored).all():
        raise ValueError("a scale is not finite in float16: take scale_bits=32, or look for infinite or NaN weights")
    return stored

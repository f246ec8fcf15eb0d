"""The quantization grid: which values a quantized weight may take, and what it costs to store them.

Every method fits its grid here, so that methods given the same options round to the same values.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FLOAT16_SMALLEST = 2.0**-24  # the smallest positive float16


@dataclass(frozen=True)
class GridSpec:
    """Which grid to build.

    Attributes:
        bits: bits of a code, 2 to 8.
        group_size: input columns that share a scale; None: the whole output row does (per-channel).
        symmetric: the zero point is the middle code and is not stored.
        scale_bits: 16 rounds the scales to float16, as they are stored; 32 keeps float32.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    scale_bits: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be a positive number of columns or null, not {self.group_size}")
        if self.scale_bits not in (16, 32):
            raise ValueError(f"scale_bits must be 16 or 32, not {self.scale_bits}")

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1

    def divides(self, in_features: int) -> bool:
        """Whether a row of `in_features` columns can be cut into groups of equal size."""
        return self.group_size is None or in_features % self.group_size == 0


@dataclass(frozen=True, eq=False)
class Grid:
    """A fitted grid, `weight = scale * (code - zero)`, for each output row and group of input columns."""

    spec: GridSpec
    scale: Tensor  # (out, groups)
    zero: Tensor  # (out, groups), whole numbers in 0..max_code
    group: Tensor  # (in,), the group that each input column belongs to

    @classmethod
    def fit(cls, weight: Tensor, spec: GridSpec) -> "Grid":
        """The min-max grid of `weight` (out, in); zero is always one of its values.

        Raises:
            ValueError: the group size does not divide the number of columns, or a scale exceeds float16.
        """
        out_features, in_features = weight.shape
        if not spec.divides(in_features):
            raise ValueError(f"group_size {spec.group_size} does not divide {in_features} columns")
        group_size = spec.group_size or in_features
        grouped = weight.reshape(out_features, -1, group_size)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        if spec.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scale = _storable((high - low) / spec.max_code, spec)
        scale = torch.where(low == high, 1.0, scale)  # an all-zero group: any positive scale represents it
        middle = torch.full_like(scale, (spec.max_code + 1) / 2)
        zero = middle if spec.symmetric else torch.round(-low / scale).clamp(0, spec.max_code)
        group = torch.arange(in_features, device=weight.device) // group_size
        return cls(spec, scale, zero, group)

    def encode(self, weight: Tensor) -> Tensor:
        """The codes of the nearest grid points to `weight` (out, in), uint8."""
        scale, zero = self.scale[:, self.group], self.zero[:, self.group]
        return (torch.round(weight / scale) + zero).clamp(0, self.spec.max_code).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """The values (out, in) that `codes` stand for."""
        return self.scale[:, self.group] * (codes - self.zero[:, self.group])

    def columns(self, start: int, stop: int) -> "Columns":
        """What rounding needs for the input columns `start` to `stop`, in the solvers' transposed layout."""
        if self.scale.shape[1] == 1:
            shape = (stop - start, self.scale.shape[0])
            scale, zero = self.scale.T.expand(shape), self.zero.T.expand(shape)
        else:
            group = self.group[start:stop]
            scale, zero = self.scale.T[group], self.zero.T[group]
        return Columns(scale.unbind(), (-zero).unbind(), (self.spec.max_code - zero).unbind())

    def permuted(self, order: Tensor) -> "Grid":
        """The same grid after its input columns were put into another order."""
        return replace(self, group=self.group[order])

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes, and of the scale and zero point of each group, for each weight."""
        zero_bits = 0 if self.spec.symmetric else self.spec.bits
        groups, columns = self.scale.shape[1], len(self.group)
        return self.spec.bits + (self.spec.scale_bits + zero_bits) * groups / columns


@dataclass(frozen=True, eq=False)
class Columns:
    """A block of a grid's input columns, one tensor (out,) a column."""

    scale: tuple[Tensor, ...]
    lowest: tuple[Tensor, ...]  # of code - zero
    highest: tuple[Tensor, ...]

    def round_(self, values: Tensor, column: int) -> Tensor:
        """Replace `values` (out,) of one column by the nearest grid points. Rounds exactly as `Grid.encode` does."""
        values.div_(self.scale[column]).round_()
        torch.clamp(values, self.lowest[column], self.highest[column], out=values)
        return values.mul_(self.scale[column])


def _storable(scale: Tensor, spec: GridSpec) -> Tensor:
    """`scale` as it can be stored in `spec.scale_bits` bits, and above zero."""
    if spec.scale_bits == 32:
        return scale.clamp(min=torch.finfo(torch.float32).tiny)
    stored = scale.half().float()
    if not torch.isfinite(stored).all():
        raise ValueError("a scale is not finite in float16: take scale_bits=32, or look for infinite or NaN weights")
    return stored.clamp(min=FLOAT16_SMALLEST)

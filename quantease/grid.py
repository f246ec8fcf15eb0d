"""The quantization grid: which values a quantized weight may take, and how many bits they take to store.

A grid is asked for with a `GridSpec` and fitted to a weight: each grid group, `group_size` neighboring input columns of
one output row or the whole row (per-channel), gets a scale. Every method fits its grid here, so that methods given the
same options round to the same values. What kinds of grid there are is in `quantease/grids/`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from quantease.grids.levels import LevelFormat, LevelGrid
from quantease.grids.scale_formats import ScaleFormat, float_format
from quantease.grids.uniform import UniformGrid
from quantease.kernels import Columns


class Grid(Protocol):
    """A grid that was fitted to a weight. Immutable, but for `fit_group_`.

    `group` is a list of numbers and not a group size, because act-order permutes the columns: a group then keeps its
    members but they are no longer neighbors.

    Attributes:
        spec: what was asked for.
        scale: (out, groups), positive, float32: what the values of a group are multiplied by.
        group: (in,), the group that each input column belongs to.
    """

    @property
    def spec(self) -> "GridSpec": ...

    @property
    def scale(self) -> Tensor: ...

    @property
    def group(self) -> Tensor: ...

    @property
    def groups(self) -> int:
        """How many grid groups a row has."""
        ...

    @property
    def clipped_scales(self) -> int:
        """How many scales are the smallest of their format. Most were clamped to it: their weights are all but zero."""
        ...

    @property
    def coarse_scales(self) -> int:
        """How many scales are below the normal numbers of float16, so that they are stored in fewer than 11 bits."""
        ...

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes and of all that is stored to tell what they stand for, divided by the number of weights."""
        ...

    def encode(self, weight: Tensor) -> Tensor:
        """The codes of the nearest grid points to `weight` (out, in), uint8."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """The values (out, in) that `codes` stand for."""
        ...

    def columns(self) -> Columns:
        """What rounding needs, column by column, in the transposed layout (in, out) of the kernels."""
        ...

    def fit_group_(self, group: int, weight: Tensor, columns: Columns) -> None:
        """Fit one group anew to the current weights of its columns (out, n), in place, here and in the kernels' form."""
        ...

    def where(self, condition: Tensor, other: Self) -> Self:
        """This grid where `condition` (out, groups) holds, and `other` elsewhere."""
        ...

    def of_rows(self, rows: slice) -> Self:
        """The grid of some of the rows; the groups of columns are the same for all rows."""
        ...

    def stacked(self, others: Sequence[Self], exponents: Sequence[int]) -> Self:
        """One grid for the rows of this one and of others, each times a power of two."""
        ...

    def permuted(self, order: Tensor) -> Self:
        """The same grid after its input columns were put into another order."""
        ...

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored of the grid, by name, without the loss of a bit."""
        ...


@dataclass(frozen=True)
class GridSpec:
    """Which grid to build.

    Attributes:
        bits: bits of a code, 2 to 8: a code is a byte in memory, and with 1 bit one of the two values would be zero.
        group_size: input columns that share a scale; None: the whole output row does (per-channel).
        symmetric: the zero point is the middle code and is not stored.
        scale_bits: 16 rounds the scales to float16, as they are stored; 32 keeps float32.
        format: levels to look up instead of whole codes, as NF4; it says what the other settings must be. None: the
            uniform grid.
        range: `minmax` covers all weights of a group, `mse` the part of that range with the least rounding error.

    Raises:
        ValueError: a setting is out of range.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = False
    scale_bits: int = 16
    range: str = "minmax"
    format: LevelFormat | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must lie in 2 to 8, not {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be a positive number of columns or null, not {self.group_size}")
        if self.scale_bits not in (16, 32):
            raise ValueError(f"scale_bits must be 16 or 32, not {self.scale_bits}")
        if self.range not in ("minmax", "mse"):
            raise ValueError(f"grid_range must be minmax or mse, not {self.range}")
        if self.format is not None:
            self.format.check(self)

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1 if self.format is None else len(self.format.levels) - 1

    @property
    def bits_per_group(self) -> float:
        """Bits of the scale and the zero point of one group; a zero point is a code, so it takes as many bits as one."""
        return self.scale_bits + (0 if self.symmetric else self.bits)

    def divides(self, in_features: int) -> bool:
        """Whether a row of `in_features` columns can be cut into groups of equal size."""
        return self.group_size is None or in_features % self.group_size == 0

    def check_division(self, in_features: int) -> None:
        """Refuse rows that cannot be cut into groups of equal size.

        Raises:
            ValueError: the group size does not divide the number of columns.
        """
        if not self.divides(in_features):
            raise ValueError(f"group_size {self.group_size} does not divide {in_features} columns")

    @property
    def scale_format(self) -> ScaleFormat:
        """What scales are stored in."""
        return float_format(self.scale_bits) if self.format is None else self.format.scale_format(self)

    @property
    def rows_independent(self) -> bool:
        """Whether the grid of a row does not depend on the other rows."""
        return self.format is None or not self.format.scales_of_tensor

    def fit(self, weight: Tensor, like: Grid | None = None) -> Grid:
        """The grid of `weight` (out, in); zero is always one of its values.

        Args:
            weight: whose columns are those of the layer, in their order.
            like: a grid of the same layer that the new one can be mixed with (`Grid.where`): where scales are stored times
                one number of the layer, it is this grid's.

        Raises:
            ValueError: the group size does not divide the number of columns, or a scale exceeds float16.
        """
        if self.format is None:
            return UniformGrid.fit(weight, self)
        return LevelGrid.fit(weight, self, self.format, like.tensor_scale if isinstance(like, LevelGrid) else None)

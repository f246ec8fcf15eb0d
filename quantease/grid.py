"""The quantization grid: which values a quantized weight may take, and how many bits they take to store.

A weight is scale * (code - zero), with a whole code of 0 to 2^bits - 1. Scale and zero point are shared by a grid group:
`group_size` neighboring input columns of one output row, or the whole row (per-channel). Every method fits its grid
here, so that methods given the same options round to the same values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.kernels import Columns
from quantease.kernels.plain import nearest_codes
from quantease.scales import FLOAT16_NORMAL, fit_range, least_error_range, smallest_scale

ROWS_BYTES = 2**24  # of a float32 matrix that are encoded at once: its half a dozen copies on the way stay below 100 MB


@dataclass(frozen=True)
class GridSpec:
    """Which grid to build.

    Attributes:
        bits: bits of a code, 2 to 8: a code is a byte in memory, and with 1 bit one of the two values would be zero.
        group_size: input columns that share a scale; None: the whole output row does (per-channel).
        symmetric: the zero point is the middle code and is not stored.
        scale_bits: 16 rounds the scales to float16, as they are stored; 32 keeps float32.
        range: `minmax` covers all weights of a group, `mse` the part of that range with the least rounding error.

    Raises:
        ValueError: a setting is out of range.
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
        """Bits of the scale and the zero point of one group; a zero point is a code, so it takes as many bits as one."""
        return self.scale_bits + (0 if self.symmetric else self.bits)

    def divides(self, in_features: int) -> bool:
        """Whether a row of `in_features` columns can be cut into groups of equal size."""
        return self.group_size is None or in_features % self.group_size == 0


@dataclass(frozen=True, eq=False)
class Grid:
    """A fitted grid, `weight = scale * (code - zero)`, for each output row and group of input columns.

    `group` is a list of numbers and not a group size, because act-order permutes the columns: a group then keeps its
    members but they are no longer neighbors.

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
            scale, zero = least_error_range(grouped, spec.max_code, lambda shrink: fit_range(grouped, spec, shrink))
        else:
            scale, zero = fit_range(grouped, spec, 1.0)
        group = torch.arange(in_features, device=weight.device) // group_size
        return cls(spec, scale, zero, group)

    @property
    def clipped_scales(self) -> int:
        """How many scales are the smallest of their format. Most were clamped to it: their weights are all but zero."""
        return int((self.scale <= smallest_scale(self.spec.scale_bits)).sum())

    @property
    def coarse_scales(self) -> int:
        """How many scales are below the normal numbers of float16, so that they are stored in fewer than 11 bits."""
        return int((self.scale < FLOAT16_NORMAL).sum()) if self.spec.scale_bits == 16 else 0

    def fit_group_(self, group: int, weight: Tensor) -> None:
        """Fit the scale and zero point of one group anew, in place, to the current weights of its columns (out, n)."""
        # Exactly these n columns are the group, wherever they are in the layer: one group of all that is given.
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
            torch.mul(codes[rows] - zero, scale, out=values[rows])  # uint8 minus float is a float
        return values

    def _of_rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Scale and zero point of some rows: (rows, in), or (rows, 1) where a row has but one, which broadcasts."""
        scale, zero = self.scale[rows], self.zero[rows]
        return (scale, zero) if scale.shape[1] == 1 else (scale[:, self.group], zero[:, self.group])

    def columns(self) -> Columns:
        """What rounding needs, column by column, in the transposed layout (in, out) of the kernels."""
        group = self.group.to(torch.int32)
        return Columns(self.scale.T.contiguous(), self.zero.T.contiguous(), group, self.spec.max_code)

    def select_rows(self, rows: slice) -> "Grid":
        """The grid of some of the rows; the groups of columns are the same for all rows."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])

    def permuted(self, order: Tensor) -> "Grid":
        """The same grid after its input columns were put into another order."""
        return replace(self, group=self.group[order])

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes, of the scale and zero point of each group, and of the order where groups are scattered.

        In groups that are not neighbors (SpQR groups the sorted columns), a reader needs the group of every column:
        16 bits for each column, shared by all rows.
        """
        (out_features, groups), columns = self.scale.shape, len(self.group)
        stored = self.spec.bits_per_group if self.stored_bits_per_group is None else self.stored_bits_per_group
        scattered = bool((self.group.diff() < 0).any())
        return self.spec.bits + stored * groups / columns + (16 / out_features if scattered else 0)


def _row_slices(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows, each so small that the copies that are made of it on the way stay small beside the layer."""
    step = max(1, ROWS_BYTES // (weight.shape[1] * 4))
    return (slice(start, start + step) for start in range(0, len(weight), step))

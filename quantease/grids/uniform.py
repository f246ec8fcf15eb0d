"""The uniform grid of whole codes: a weight is scale * (code - zero), with a code of 0 to 2^bits - 1.

Scale and zero point are shared by a grid group: `group_size` neighboring input columns of one output row, or the whole
row (per-channel).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantease.grids.rows import row_slices
from quantease.grids.scale_formats import FLOAT16_NORMAL, FP16
from quantease.grids.scales import fit_range, least_error_range
from quantease.kernels import Columns
from quantease.kernels.plain import nearest_codes

if TYPE_CHECKING:
    from quantease.grid import GridSpec


@dataclass(frozen=True, eq=False)
class UniformGrid:
    """A fitted grid, `weight = scale * (code - zero)`, for each output row and group of input columns.

    `group` is a list of numbers and not a group size, because act-order permutes the columns: a group then keeps its
    members but they are no longer neighbors.

    Attributes:
        stored_bits_per_group: bits of the scale and zero point of a group, where they are not what the spec says.
    """

    spec: "GridSpec"
    scale: Tensor  # (out, groups)
    zero: Tensor  # (out, groups)
    group: Tensor  # (in,), the group that each input column belongs to
    stored_bits_per_group: float | None = None

    @classmethod
    def fit(cls, weight: Tensor, spec: "GridSpec") -> "UniformGrid":
        """The grid of `weight` (out, in); zero is always one of its values.

        Raises:
            ValueError: the group size does not divide the number of columns, or a scale exceeds float16.
        """
        out_features, in_features = weight.shape
        spec.check_division(in_features)
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
        return int((self.scale <= self.spec.scale_format.smallest).sum())

    @property
    def coarse_scales(self) -> int:
        """How many scales are below the normal numbers of float16, so that they are stored in fewer than 11 bits."""
        return int((self.scale < FLOAT16_NORMAL).sum()) if self.spec.scale_format is FP16 else 0

    @property
    def groups(self) -> int:
        """How many grid groups a row has."""
        return self.scale.shape[1]

    def fit_group_(self, group: int, weight: Tensor, columns: Columns) -> None:
        """Fit one group anew to the current weights of its columns (out, n), in place, here and in the kernels' form."""
        # Exactly these n columns are the group, wherever they are in the layer: one group of all that is given.
        fitted = UniformGrid.fit(weight, replace(self.spec, group_size=None))
        self.scale[:, group], self.zero[:, group] = fitted.scale[:, 0], fitted.zero[:, 0]
        columns.scale[group], columns.zero[group] = fitted.scale[:, 0], fitted.zero[:, 0]

    def where(self, condition: Tensor, other: "UniformGrid") -> "UniformGrid":
        """This grid where `condition` (out, groups) holds, and `other` elsewhere."""
        scale, zero = torch.where(condition, self.scale, other.scale), torch.where(condition, self.zero, other.zero)
        return replace(self, scale=scale, zero=zero)

    def encode(self, weight: Tensor) -> Tensor:
        """The codes of the nearest grid points to `weight` (out, in), uint8."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for rows in row_slices(weight):
            scale, zero = self._of_rows(rows)
            codes[rows] = nearest_codes(weight[rows], scale, zero, self.spec.max_code)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The values (out, in) that `codes` stand for."""
        values = torch.empty(codes.shape, dtype=self.scale.dtype, device=codes.device)
        for rows in row_slices(codes):
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

    def of_rows(self, rows: slice) -> "UniformGrid":
        """The grid of some of the rows; the groups of columns are the same for all rows."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])

    def stacked(self, others: Sequence["UniformGrid"], exponents: Sequence[int]) -> "UniformGrid":
        """One grid for the rows of this one and of others, each times a power of two."""
        parts = [self, *others]
        scale = torch.cat([part.scale * 2.0**exponent for part, exponent in zip(parts, exponents, strict=True)])
        return replace(self, scale=scale, zero=torch.cat([part.zero for part in parts]))

    def permuted(self, order: Tensor) -> "UniformGrid":
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

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored of the grid, by name."""
        return {"scale": self.scale, "zero": self.zero, "group": self.group.to(torch.int32)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: "GridSpec", stored: float | None) -> "UniformGrid":
        """The grid that gave `to_tensors`; `stored` is its `stored_bits_per_group`."""
        return cls(spec, tensors["scale"], tensors["zero"], tensors["group"].long(), stored)

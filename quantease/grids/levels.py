"""A grid of sorted levels: a weight is scale * level, the level that its code counts; there is no zero point.

NF4, MXFP4 and NVFP4 are such grids (a file each). They differ in their levels, in how the scale of a group follows from
the largest |w| in it, and in the format that scales are stored in.

The code of w is the number of thresholds that w / scale exceeds. Thresholds are the middles between neighboring levels,
so the level is the nearest one; a middle itself goes down, or up where the threshold is the float just below it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from quantease.grids.rows import row_slices
from quantease.grids.scale_formats import FLOAT16_NORMAL, FP16, ScaleFormat, holds
from quantease.kernels import Columns
from quantease.kernels.plain import nearest_level_codes

if TYPE_CHECKING:
    from quantease.grid import GridSpec


class LevelFormat(Protocol):
    """A kind of grid that looks levels up: a frozen dataclass without settings."""

    @property
    def name(self) -> str:
        """What `grid=` and tables call it."""
        ...

    @property
    def levels(self) -> Tensor:
        """The levels in rising order, float32; zero is one of them."""
        ...

    @property
    def thresholds(self) -> Tensor:
        """What w / scale must exceed for each level but the lowest, float32."""
        ...

    @property
    def scales_of_tensor(self) -> bool:
        """Whether all scales of a layer depend on its largest weight, so that its rows are not independent."""
        ...

    def check(self, spec: "GridSpec") -> None:
        """Refuse a request that contradicts the format.

        Raises:
            ValueError: saying what does, and what to set.
        """
        ...

    def scale_format(self, spec: "GridSpec") -> ScaleFormat:
        """What the scales of groups are stored in."""
        ...

    def tensor_scale(self, weight: Tensor) -> Tensor | None:
        """The one number of the layer that scales are stored times, a float32 scalar; None: there is none."""
        ...

    def group_scale(self, largest: Tensor, spec: "GridSpec", tensor_scale: Tensor | None) -> Tensor:
        """The scale of a group, as it is stored, from the largest |w| in it; shapes are equal."""
        ...


def thresholds_of(levels: Tensor, goes_up: Callable[[int], bool] = lambda _: False) -> Tensor:
    """The thresholds between sorted levels; `goes_up(i)`: the middle between levels i and i + 1 is rounded up."""
    middle = (levels[1:] + levels[:-1]) / 2
    up = torch.tensor([goes_up(place) for place in range(len(middle))])
    return torch.where(up, torch.nextafter(middle, torch.full_like(middle, -torch.inf)), middle)


def check_request(spec: "GridSpec", name: str, bits: int, group_size: int | None, own_scales: bool) -> None:
    """Refuse what no format of levels can do, and what this one cannot.

    Args:
        spec: the request.
        name: of the format.
        bits: of its codes.
        group_size: the columns of its groups; None: any.
        own_scales: the format says what scales are stored in.

    Raises:
        ValueError: saying what contradicts the format, and what to set.
    """
    if spec.bits != bits:
        raise ValueError(f"grid={name} has codes of {bits} bits, which bits={spec.bits} contradicts: set bits={bits}")
    if group_size is not None and spec.group_size != group_size:
        raise ValueError(f"grid={name} has groups of {group_size} columns, not of {spec.group_size}")
    if spec.symmetric:
        raise ValueError(f"grid={name} has no zero points that symmetric=true could leave out: set symmetric=false")
    if spec.range != "minmax":
        raise ValueError(f"grid={name} takes its scales from the largest weights: set grid_range=minmax")
    if own_scales and spec.scale_bits != 16:
        raise ValueError(
            f"grid={name} has scales of 8 bits, which scale_bits={spec.scale_bits} contradicts: leave it at 16"
        )


@dataclass(frozen=True, eq=False)
class LevelGrid:
    """A fitted grid of levels; see `quantease.grid.Grid`.

    Attributes:
        format: its levels, and how scales are made.
        tensor_scale: what scales are stored times, a float32 scalar: a stored one is scale * tensor_scale.
    """

    spec: "GridSpec"
    format: LevelFormat
    scale: Tensor  # (out, groups)
    group: Tensor  # (in,)
    tensor_scale: Tensor | None = None

    @classmethod
    def fit(
        cls, weight: Tensor, spec: "GridSpec", kind: LevelFormat, tensor_scale: Tensor | None = None
    ) -> "LevelGrid":
        """The grid of `weight` (out, in), with a tensor scale of its own unless one is given.

        Raises:
            ValueError: the group size does not divide the number of columns, or a weight is not finite.
        """
        out_features, in_features = weight.shape
        spec.check_division(in_features)
        group_size = spec.group_size or in_features
        largest = weight.reshape(out_features, -1, group_size).abs().amax(-1)
        if not torch.isfinite(largest).all():
            raise ValueError("a scale is not finite: look for infinite or NaN weights")
        tensor_scale = kind.tensor_scale(weight) if tensor_scale is None else tensor_scale
        scale = kind.group_scale(largest, spec, tensor_scale)
        return cls(spec, kind, scale, torch.arange(in_features, device=weight.device) // group_size, tensor_scale)

    @property
    def groups(self) -> int:
        """How many grid groups a row has."""
        return self.scale.shape[1]

    @property
    def clipped_scales(self) -> int:
        """How many scales are the smallest of their format."""
        stored = self.scale if self.tensor_scale is None else self.scale * self.tensor_scale
        return int((stored <= self.spec.scale_format.smallest).sum())

    @property
    def coarse_scales(self) -> int:
        """How many scales are below the normal numbers of float16, if that is their format."""
        return int((self.scale < FLOAT16_NORMAL).sum()) if self.spec.scale_format is FP16 else 0

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes, of a scale for each group, and of the tensor scale."""
        (out_features, groups), columns = self.scale.shape, len(self.group)
        tensor = 0 if self.tensor_scale is None else 32 / (out_features * columns)
        return self.spec.bits + self.spec.scale_format.bits * groups / columns + tensor

    def encode(self, weight: Tensor) -> Tensor:
        """The codes of the nearest grid points to `weight` (out, in), uint8."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        thresholds = self.format.thresholds.to(weight)
        for rows in row_slices(weight):
            codes[rows] = nearest_level_codes(weight[rows], self._of_rows(rows), thresholds)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """The values (out, in) that `codes` stand for."""
        values = torch.empty(codes.shape, dtype=self.scale.dtype, device=codes.device)
        levels = self.format.levels.to(self.scale)
        for rows in row_slices(codes):
            torch.mul(levels[codes[rows].long()], self._of_rows(rows), out=values[rows])
        return values

    def _of_rows(self, rows: slice) -> Tensor:
        scale = self.scale[rows]
        return scale if self.groups == 1 else scale[:, self.group]

    def columns(self) -> Columns:
        """What rounding needs, column by column, in the transposed layout (in, out) of the kernels."""
        scale = self.scale.T.contiguous()
        levels, thresholds = self.format.levels.to(scale), self.format.thresholds.to(scale)
        return Columns(scale, scale, self.group.to(torch.int32), self.spec.max_code, levels, thresholds)

    def fit_group_(self, group: int, weight: Tensor, columns: Columns) -> None:
        """Fit one group anew to the current weights of its columns (out, n), in place, here and in the kernels' form.

        The tensor scale stays: larger weights than the layer had at first may have scales that saturate.
        """
        fitted = self.format.group_scale(weight.abs().amax(1), self.spec, self.tensor_scale)
        self.scale[:, group], columns.scale[group] = fitted, fitted

    def where(self, condition: Tensor, other: "LevelGrid") -> "LevelGrid":
        """This grid where `condition` (out, groups) holds, and `other`, of the same tensor scale, elsewhere."""
        return replace(self, scale=torch.where(condition, self.scale, other.scale))

    def of_rows(self, rows: slice) -> "LevelGrid":
        """The grid of some of the rows."""
        return replace(self, scale=self.scale[rows])

    def stacked(self, others: Sequence["LevelGrid"], exponents: Sequence[int]) -> "LevelGrid":
        """One grid for the rows of this one and of others, each times a power of two.

        Raises:
            ValueError: they have tensor scales, of which a layer can store but one.
        """
        if self.tensor_scale is not None:
            raise ValueError(f"a layer on {self.format.name} has one scale of its own: its rows cannot be solved apart")
        parts = [self, *others]
        scale = torch.cat([part.scale * 2.0**exponent for part, exponent in zip(parts, exponents, strict=True)])
        return replace(self, scale=scale)

    def permuted(self, order: Tensor) -> "LevelGrid":
        """The same grid after its input columns were put into another order."""
        return replace(self, group=self.group[order])

    def to_tensors(self) -> dict[str, Tensor]:
        """What is stored of the grid, by name: scales of 8 bits are bytes.

        Raises:
            ValueError: a scale is none of its format.
        """
        form, group = self.spec.scale_format, self.group.to(torch.int32)
        if self.tensor_scale is None:
            return {"scale": form.to_bytes(self.scale), "group": group}
        stored = form.to_bytes(form.storable(self.scale * self.tensor_scale))
        if not holds(form.from_bytes(stored) / self.tensor_scale == self.scale):
            raise ValueError(f"a scale is not a number of {form.name}")
        return {"scale": stored, "group": group, "tensor_scale": self.tensor_scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], spec: "GridSpec", kind: LevelFormat) -> "LevelGrid":
        """The grid that gave `to_tensors`."""
        scale, tensor_scale = spec.scale_format.from_bytes(tensors["scale"]), tensors.get("tensor_scale")
        scale = scale if tensor_scale is None else scale / tensor_scale
        return cls(spec, kind, scale, tensors["group"].long(), tensor_scale)

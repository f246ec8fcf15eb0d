"""The tensors that files hold for one quantized layer, which is read when its decoder block is opened, and not before."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from runners.errors import InputError

BYTES = {  # of one number, by its type in a safetensors file
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """That the tensor takes in the file."""
        return 8 * BYTES.get(self.dtype, 8) * math.prod(self.shape)


@dataclass(frozen=True)
class Parts:
    """The tensors of one layer by the last part of their names, such as `qweight`.

    Attributes:
        layer: the name of its module in the files.
        headers: of its tensors.
    """

    layer: str
    headers: Mapping[str, Header]

    def __contains__(self, part: str) -> bool:
        return part in self.headers

    def read(self, part: str) -> Tensor:
        """A tensor on the CPU.

        Raises:
            InputError: the layer has none of that name.
        """
        self.require(part)
        with safe_open(self.headers[part].file, framework="pt") as opened:
            return opened.get_tensor(f"{self.layer}.{part}")

    def shape(self, part: str) -> tuple[int, ...]:
        """Of a tensor, from the file's header.

        Raises:
            InputError: the layer has none of that name.
        """
        self.require(part)
        return self.headers[part].shape

    def require(self, *parts: str) -> None:
        """Refuse a layer that lacks one of these tensors."""
        for part in parts:
            if part not in self.headers:
                there = next(iter(self.headers))
                raise self.wrong(there, f"stands there without {self.layer}.{part}, without which it cannot be read")

    def require_shape(self, part: str, *shapes: tuple[int, ...], dtypes: tuple[str, ...] = ()) -> None:
        """Refuse a tensor of another shape than one of these, or of another type."""
        if (found := self.shape(part)) not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise self.wrong(part, f"has the shape {found}, and should have {wanted}")
        if dtypes and self.headers[part].dtype not in dtypes:
            raise self.wrong(part, f"is of type {self.headers[part].dtype}, and should be {' or '.join(dtypes)}")

    def wrong(self, part: str, what: str) -> InputError:
        """The error that names the layer's tensor and its file."""
        return InputError(f"the tensor {self.layer}.{part} in {self.headers[part].file} {what}")

    @property
    def bits(self) -> int:
        """All that is stored for the layer: codes, scales, zero points, indices, tables."""
        return sum(header.bits for header in self.headers.values())


def headers_of(files: list[Path]) -> dict[str, Header]:
    """What safetensors files, which are known to be whole, say of all their tensors."""
    found: dict[str, Header] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                piece = opened.get_slice(name)
                found[name] = Header(file, piece.get_dtype(), tuple(piece.get_shape()))
    return found


def finite(parts: Parts, part: str, tensor: Tensor) -> Tensor:
    """The tensor as float32; refused where it has a number that is not finite."""
    numbers = tensor.float()
    if numbers.numel() and not all(map(torch.isfinite, numbers.aminmax())):
        raise parts.wrong(part, "contains NaN or infinity: the file is damaged")
    return numbers


def two_dimensions(parts: Parts, part: str) -> tuple[int, int]:
    """The shape of a tensor that must be a matrix."""
    if len(shape := parts.shape(part)) != 2:
        raise parts.wrong(part, f"has the shape {shape}, and should have two dimensions")
    return shape[0], shape[1]


def columns_of_groups(parts: Parts, part: str, columns: int, groups: int, group_size: int | None) -> None:
    """Refuse scales of another number of groups than the group size of the config makes of the columns.

    Args:
        group_size: None: all columns are one group.
    """
    if groups != (expected := -(-columns // group_size) if group_size else 1):
        size = "one group a row" if group_size is None else f"groups of {group_size}"
        raise parts.wrong(part, f"has {groups} groups, and {columns} columns in {size} have {expected}")


def group_indices(parts: Parts, part: str, groups: int) -> Tensor:
    """The group of each column, int64, as an act-order checkpoint stores it."""
    group = parts.read(part).long()
    if int(group.min()) < 0 or int(group.max()) >= groups:
        outside = next(index for index in group.tolist() if not 0 <= index < groups)
        raise parts.wrong(part, f"names the group {outside}, and there are {groups}")
    return group

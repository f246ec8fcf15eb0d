"""The layouts `pack-quantized`, `naive-quantized` and `int-quantized` of compressed-tensors: integers of 2 to 8 bits.

W[o, i] = weight_scale[o, g] (q[o, i] - weight_zero_point[o, g]), where g is the group of column i: weight_g_idx[i], or
i // group_size; with the strategies `channel` and `tensor` there is one. Codes are signed; packed ones are stored plus
2^(bits - 1) in 32-bit words (https://github.com/vllm-project/compressed-tensors, `compressors/pack_quantized`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from runners.formats.compressed_config import Group, layers_of, read_groups
from runners.formats.parts import Parts, columns_of_groups, finite, group_indices
from runners.formats.scheme import Scheme
from runners.formats.words import WORD, unpack_separate, unpack_words, words_for

PARTS = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape")
FLOATS = ("F16", "BF16", "F32")
Packing = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class CompressedLayout:
    """What the config says: groups of layers, each with a grid."""

    groups: tuple[Group, ...]

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> "CompressedLayout":
        """From the entries of a config.

        Raises:
            InputError: they name a format, or a treatment of activations, that cannot be measured.
        """
        return cls(read_groups(config, where))

    def made_by(self, method: str) -> "CompressedLayout":
        """The same with the name of the method, which the config does not have."""
        return CompressedLayout(
            tuple(replace(group, scheme=replace(group.scheme, method=method)) for group in self.groups)
        )

    def parts_of(self, names: set[str]) -> dict[str, dict[str, str]]:
        """The layers by their `weight_packed`, or by a `weight_scale` beside their `weight`."""
        return layers_of(names, PARTS)

    def open(self, parts: Parts) -> "CompressedLayer":
        """A layer, whose shapes are checked against each other.

        Raises:
            InputError: as for all layouts.
        """
        group = self._group(parts)
        parts.require("weight_scale")
        out, columns = _shape(parts)
        scheme, packed = group.scheme, "weight_packed" in parts
        if packed:
            sizes = {words_for(columns, scheme.bits), -(-columns // (WORD // scheme.bits))}
            parts.require_shape("weight_packed", *((out, size) for size in sizes), dtypes=("I32",))
        elif parts.headers["weight"].dtype != "I8":
            raise parts.wrong(
                "weight", f"is of type {parts.headers['weight'].dtype}, and only integers (I8) can be read"
            )
        groups = _groups(parts, out, group.strategy)
        if group.strategy == "group":
            columns_of_groups(parts, "weight_scale", columns, groups, scheme.group_size)
        if not scheme.symmetric:
            parts.require("weight_zero_point")
        layer = CompressedLayer(parts, scheme, (out, columns), groups)
        layer.check_zero_point()
        layer.check_packing()
        return layer

    def _group(self, parts: Parts) -> Group:
        """The group of the config that a layer belongs to."""
        of_layer = [group for group in self.groups if group.has(parts.layer)]
        if len(of_layer) == 1:
            return of_layer[0]
        what = "no config group" if not of_layer else f"{len(of_layer)} config groups"
        raise parts.wrong("weight_scale" if "weight_scale" in parts else next(iter(parts.headers)), f"is of {what}")


@dataclass(frozen=True)
class CompressedLayer:
    """One layer; see `PackedLayer`.

    Attributes:
        groups: scales of a row.
    """

    parts: Parts
    scheme: Scheme
    shape: tuple[int, int]
    groups: int

    def weight(self) -> Tensor:
        """The weight (out, in), float32."""
        out, columns = self.shape
        scale = finite(self.parts, "weight_scale", self.parts.read("weight_scale")).reshape(-1, self.groups)
        group = self._group_of_columns(columns)
        zero = self._zero_point()
        codes = self._codes().int()
        if zero is not None:
            codes = codes - zero.int().reshape(-1, self.groups).expand(out, -1)[:, group]
        return codes.float() * scale.expand(out, -1)[:, group]

    def check_zero_point(self) -> None:
        """Refuse zero points of a shape that does not belong to the scales; packed ones go along the rows of the weight."""
        if "weight_zero_point" not in self.parts:
            return
        if self._zero_is_packed:
            bits, out = self.scheme.bits, self.shape[0]
            sizes = {words_for(out, bits), -(-out // (WORD // bits))}
            self.parts.require_shape("weight_zero_point", *((size, self.groups) for size in sizes))
        else:
            self.parts.require_shape("weight_zero_point", self.parts.shape("weight_scale"), dtypes=("I8",))

    def check_packing(self) -> None:
        """Refuse packed tensors of which it cannot be told whether their codes cross from word to word."""
        if "weight_packed" in self.parts and len(self._packings) != 1:
            how = "two ways" if self._packings else "no one way"
            raise self.parts.wrong(
                "weight_packed", f"can be read in {how}, with codes that cross from word to word or not"
            )

    @property
    def _packings(self) -> list[Packing]:
        """The ways of packing that the shapes of all packed tensors allow; one where both give the same words."""
        bits = self.scheme.bits
        counts = [(self.parts.shape("weight_packed")[1], self.shape[1])]
        if "weight_zero_point" in self.parts and self._zero_is_packed:
            counts.append((self.parts.shape("weight_zero_point")[0], self.shape[0]))
        dense = all(words == words_for(count, bits) for words, count in counts)
        separate = all(words == -(-count // (WORD // bits)) for words, count in counts)
        same = WORD % bits == 0 or all(words == 1 for words, _ in counts)
        return [unpack_words] * dense + [unpack_separate] * (separate and not (dense and same))

    @property
    def _zero_is_packed(self) -> bool:
        return self.parts.headers["weight_zero_point"].dtype == "I32"

    def _codes(self) -> Tensor:
        """Signed codes (out, in)."""
        if "weight_packed" not in self.parts:
            return self.parts.read("weight")
        return self._unpack(self.parts.read("weight_packed"), self.shape[1])

    def _zero_point(self) -> Tensor | None:
        """Signed zero points (out, groups), or of fewer rows where all share them; None: they are zero."""
        if "weight_zero_point" not in self.parts:
            return None
        stored = self.parts.read("weight_zero_point")
        if not self._zero_is_packed:
            return stored
        return self._unpack(stored.T.contiguous(), self.shape[0]).T

    def _unpack(self, words: Tensor, count: int) -> Tensor:
        """Signed codes (rows, count) from words (rows, words)."""
        bits = self.scheme.bits
        return self._packings[0](words, bits, count).int() - (1 << bits - 1)

    def _group_of_columns(self, columns: int) -> Tensor:
        if "weight_g_idx" in self.parts:
            self.parts.require_shape("weight_g_idx", (columns,))
            if int(self.parts.read("weight_g_idx").min()) >= 0:  # -1 stands for an order that was never set
                return group_indices(self.parts, "weight_g_idx", self.groups)
        return torch.arange(columns) // (self.scheme.group_size or columns)


def _shape(parts: Parts) -> tuple[int, int]:
    """The shape of the weight (out, in)."""
    if "weight_packed" not in parts:
        parts.require("weight")
        shape = parts.shape("weight")
    else:
        parts.require("weight_shape")
        parts.require_shape("weight_shape", (2,), dtypes=("I64", "I32"))
        shape = tuple(int(size) for size in parts.read("weight_shape"))
    if len(shape) != 2 or min(shape) < 1:
        raise parts.wrong(
            "weight_packed" if "weight_packed" in parts else "weight", f"has the shape {shape}: no matrix"
        )
    return shape[0], shape[1]


def _groups(parts: Parts, out: int, strategy: str) -> int:
    """The scales of a row, which `weight_scale` has in one of the shapes of its strategy."""
    found = parts.shape("weight_scale")
    groups = found[1] if len(found) == 2 and strategy == "group" else 1
    shapes = {"tensor": ((1,), (), (1, 1)), "channel": ((out, 1), (out,)), "group": ((out, groups),)}
    parts.require_shape("weight_scale", *shapes[strategy], dtypes=FLOATS)
    return groups

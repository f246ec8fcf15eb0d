"""AWQ's layout `gemm`, as AutoAWQ writes it (https://github.com/casper-hansen/AutoAWQ, `WQLinear_GEMM`): 4 bits.

W[o, i] = scales[g, o] (q[i, o] - z[g, o]) with g = i // group_size. `qweight` (in, out) and `qzeros` (groups, out) are both
packed along the rows, eight codes to a word in the order 0 2 4 6 1 3 5 7.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runners.errors import InputError
from runners.formats.parts import Parts, columns_of_groups, finite, two_dimensions
from runners.formats.scheme import Scheme, modules_with
from runners.formats.words import unpack_words

BITS = 4
CODES = 8  # of a word
ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where in its word the code of each of eight columns is


@dataclass(frozen=True)
class AwqLayout:
    """What the config says of all layers."""

    scheme: Scheme

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> "AwqLayout":
        """From the entries of a config, in transformers' words or in those of AutoAWQ's own `quant_config.json`.

        Raises:
            InputError: they name another layout.
        """
        version = str(config.get("version", config.get("checkpoint_format", "gemm"))).lower()
        bits = config.get("bits", config.get("w_bit", BITS))
        group = config.get("group_size", config.get("q_group_size", -1))
        if version != "gemm":
            raise InputError(f"version in {where} is {version}, and of AWQ's layouts only gemm can be read: convert it")
        if bits != BITS:
            raise InputError(f"bits in {where} is {bits!r}: AWQ's layout gemm has {BITS}")
        if type(group) is not int or (group < 1 and group != -1):
            raise InputError(f"group_size in {where} is {group!r}: it must be a number of columns, or -1 for all")
        size = None if group == -1 else group
        symmetric = not config.get("zero_point", True)
        return cls(Scheme("awq", "awq gemm", BITS, size, symmetric, act_order=False))

    def parts_of(self, names: set[str]) -> dict[str, dict[str, str]]:
        """The layers by their `qweight`."""
        return modules_with(names, "qweight", ("qzeros", "scales"))

    def open(self, parts: Parts) -> "AwqLayer":
        """A layer, whose shapes are checked against each other.

        Raises:
            InputError: as for all layouts.
        """
        parts.require("qweight", "qzeros", "scales")
        (columns, words), (groups, _) = two_dimensions(parts, "qweight"), two_dimensions(parts, "scales")
        parts.require_shape("qweight", (columns, words), dtypes=("I32",))
        parts.require_shape("qzeros", (groups, words), dtypes=("I32",))
        parts.require_shape("scales", (groups, words * CODES), dtypes=("F16", "BF16", "F32"))
        columns_of_groups(parts, "scales", columns, groups, self.scheme.group_size)
        return AwqLayer(parts, self.scheme, (words * CODES, columns))


@dataclass(frozen=True)
class AwqLayer:
    """One layer; see `PackedLayer`."""

    parts: Parts
    scheme: Scheme
    shape: tuple[int, int]

    def weight(self) -> Tensor:
        """The weight (out, in), float32."""
        out, columns = self.shape
        codes, zeros = (self._codes(part, out).int() for part in ("qweight", "qzeros"))
        scales = finite(self.parts, "scales", self.parts.read("scales"))
        group = torch.arange(columns) // (self.scheme.group_size or columns)
        return ((codes - zeros[group]).float() * scales[group]).T.contiguous()

    def _codes(self, part: str, out: int) -> Tensor:
        """The codes (rows, out) of a packed tensor, in the order of the columns."""
        packed = unpack_words(self.parts.read(part), BITS, out)
        return packed.reshape(len(packed), -1, CODES)[:, :, ORDER].reshape(len(packed), out)

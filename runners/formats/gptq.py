"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

W[o, i] = scales[g, o] (q[i, o] - z[g, o]), where g = g_idx[i], or i // group_size where there is no g_idx. `qweight`
(in, out) and `qzeros` (groups, out) are packed into 32-bit words, down the columns and along the rows. In version 1,
`qzeros` holds z - 1 (https://github.com/AutoGPTQ/AutoGPTQ); in version 2, `checkpoint_format` `gptq_v2`, z itself.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from runners.errors import InputError
from runners.formats.parts import Parts, columns_of_groups, finite, group_indices, two_dimensions
from runners.formats.scheme import Scheme, modules_with
from runners.formats.words import WORD, unpack_words, words_for

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}  # by `checkpoint_format`


@dataclass(frozen=True)
class GptqLayout:
    """What `quantization_config` says of all layers.

    Attributes:
        version: 1 or 2.
        dynamic: some layers may have other settings: what their tensors show is taken.
    """

    scheme: Scheme
    version: int
    dynamic: bool

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> "GptqLayout":
        """From the entries of a config.

        Args:
            where: file and key of the config, for messages.

        Raises:
            InputError: they name another layout.
        """
        name = str(config.get("checkpoint_format") or "gptq")
        if name not in VERSIONS or config.get("is_marlin_format"):
            name = "marlin" if config.get("is_marlin_format") else name
            raise InputError(
                f"checkpoint_format in {where} is {name}, and only {' and '.join(VERSIONS)} can be read: save it as gptq"
            )
        bits, group = config.get("bits"), config.get("group_size", -1)
        if bits not in BITS:
            raise InputError(f"bits in {where} is {bits!r}: of this layout {', '.join(map(str, BITS))} can be read")
        if type(group) is not int or (group < 1 and group != -1):
            raise InputError(f"group_size in {where} is {group!r}: it must be a number of columns, or -1 for all")
        scheme = Scheme(
            method=str(config.get("method") or config.get("quant_method") or "gptq").lower(),
            layout=f"gptq v{VERSIONS[name]}",
            bits=bits,
            group_size=None if group == -1 else group,
            symmetric=bool(config.get("sym", False)),
            act_order=bool(config.get("desc_act", False)),
        )
        return cls(scheme, VERSIONS[name], bool(config.get("dynamic")))

    def parts_of(self, names: set[str]) -> dict[str, dict[str, str]]:
        """The layers by their `qweight`."""
        return modules_with(names, "qweight", ("qzeros", "scales", "g_idx"))

    def open(self, parts: Parts) -> "GptqLayer":
        """A layer, whose shapes are checked against each other.

        Raises:
            InputError: as for all layouts.
        """
        parts.require("qweight", "qzeros", "scales")
        (rows, out), (groups, _) = two_dimensions(parts, "qweight"), two_dimensions(parts, "scales")
        bits = self.scheme.bits
        columns = rows * WORD // bits
        if "g_idx" in parts:
            columns = parts.shape("g_idx")[0] if parts.shape("g_idx") else 0
            parts.require_shape("g_idx", (columns,), dtypes=("I32", "I64"))
            if self.dynamic and columns and rows * WORD // columns in BITS:
                bits = rows * WORD // columns
        parts.require_shape("qweight", (words_for(columns, bits), out), dtypes=("I32",))
        parts.require_shape("qzeros", (groups, words_for(out, bits)), dtypes=("I32",))
        parts.require_shape("scales", (groups, out), dtypes=("F16", "BF16", "F32"))
        if not self.dynamic:
            columns_of_groups(parts, "scales", columns, groups, self.scheme.group_size)
        elif "g_idx" not in parts:
            raise parts.wrong(
                "scales", "is of a layer without g_idx, and `dynamic` leaves open how large its groups are"
            )
        return GptqLayer(parts, replace(self.scheme, bits=bits), (out, columns), self.version)


@dataclass(frozen=True)
class GptqLayer:
    """One layer; see `PackedLayer`."""

    parts: Parts
    scheme: Scheme
    shape: tuple[int, int]
    version: int

    def weight(self) -> Tensor:
        """The weight (out, in), float32."""
        (out, columns), bits = self.shape, self.scheme.bits
        codes = unpack_words(self.parts.read("qweight").T.contiguous(), bits, columns)  # (out, in)
        zeros = unpack_words(self.parts.read("qzeros"), bits, out).T.int()  # (out, groups)
        scales = finite(self.parts, "scales", self.parts.read("scales")).T
        if self.version == 1:
            self._refuse_wrapped(zeros, bits)
            zeros = zeros + 1
        if "g_idx" in self.parts:
            group = group_indices(self.parts, "g_idx", scales.shape[1])
        else:
            group = torch.arange(columns) // (self.scheme.group_size or columns)
        # Exact in float32: a scale has at most 11 binary digits (24 if it is float32, then rounded once), a code 9.
        return (codes.int() - zeros[:, group]).float() * scales[:, group]

    def _refuse_wrapped(self, zeros: Tensor, bits: int) -> None:
        """Version 1 cannot hold a zero point of 0: it wraps around, and what tools make of it differs."""
        if int(zeros.max()) == (1 << bits) - 1:
            raise self.parts.wrong(
                "qzeros", "has a zero point of 0, which version 1 of the layout cannot hold: save it as gptq_v2"
            )

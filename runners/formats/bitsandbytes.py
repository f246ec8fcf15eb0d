"""bitsandbytes' layout of 4 bits (https://github.com/bitsandbytes-foundation/bitsandbytes, `QuantState`): NF4 and FP4.

The weight's numbers, row after row, are cut into blocks of `blocksize`: w = absmax[block] quant_map[code]. Two codes share a
byte, the first in its upper half. With nested quantization `absmax` is itself a byte: nested_absmax[block of blocks]
nested_quant_map[byte] + nested_offset. Shape, block sizes and offset are JSON in a tensor of bytes.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runners.errors import InputError
from runners.formats.parts import Parts, finite
from runners.formats.scheme import Scheme, modules_with

STATE = "weight.quant_state.bitsandbytes__"  # and then the type
TYPES = ("nf4", "fp4")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
PARTS = ("weight", "weight.absmax", "weight.quant_map", *NESTED)
BITS, LEVELS = 4, 16


@dataclass(frozen=True)
class BitsandbytesLayout:
    """What the config says of all layers: nothing that their tensors do not say, too."""

    kind: str

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> "BitsandbytesLayout":
        """From the entries of a config.

        Raises:
            InputError: the weights have 8 bits, whose outliers are only found while the model runs.
        """
        if config.get("load_in_8bit") or config.get("_load_in_8bit"):
            raise InputError(
                f"{where} says that bitsandbytes has quantized the weights to 8 bits, with which inputs are rounded, too: "
                "only its 4 bits can be measured"
            )
        kind = str(config.get("bnb_4bit_quant_type", "fp4"))
        if kind not in TYPES:
            raise InputError(f"bnb_4bit_quant_type in {where} is {kind}, not one of {', '.join(TYPES)}")
        return cls(kind)

    def parts_of(self, names: set[str]) -> dict[str, dict[str, str]]:
        """The layers by the tensor that describes them."""
        return modules_with(names, STATE + self.kind, PARTS)

    def open(self, parts: Parts) -> "BitsandbytesLayer":
        """A layer, whose shapes are checked against what it says of itself.

        Raises:
            InputError: as for all layouts.
        """
        state = _state(parts, STATE + self.kind)
        parts.require("weight", "weight.absmax", "weight.quant_map")
        shape, size = tuple(state["shape"]), state["blocksize"]
        if len(shape) != 2:
            raise parts.wrong(STATE + self.kind, f"says that the weight has the shape {shape}, which is no matrix")
        count = math.prod(shape)
        blocks = -(-count // size)
        nested = "nested_blocksize" in state
        parts.require_shape("weight", (-(-count // 2), 1), (1, -(-count // 2)), (-(-count // 2),), dtypes=("U8",))
        parts.require_shape("weight.absmax", (blocks,), dtypes=("U8",) if nested else ("F32",))
        parts.require_shape("weight.quant_map", (LEVELS,), dtypes=("F32",))
        if nested:
            parts.require(*NESTED)
            parts.require_shape("weight.nested_absmax", (-(-blocks // state["nested_blocksize"]),), dtypes=("F32",))
            parts.require_shape("weight.nested_quant_map", (256,), dtypes=("F32",))
        layout = "bitsandbytes" + ", absmax quantized, too" * nested
        scheme = Scheme(self.kind, layout, BITS, size, symmetric=True, act_order=False, grid=self.kind)
        return BitsandbytesLayer(parts, scheme, (shape[0], shape[1]), state)


@dataclass(frozen=True)
class BitsandbytesLayer:
    """One layer; see `PackedLayer`.

    Attributes:
        state: block sizes and offset, as bitsandbytes names them.
    """

    parts: Parts
    scheme: Scheme
    shape: tuple[int, int]
    state: dict[str, Any]

    def weight(self) -> Tensor:
        """The weight (out, in), float32."""
        packed = self.parts.read("weight").flatten()
        codes = torch.stack([packed >> BITS, packed & LEVELS - 1], dim=1).flatten()[: math.prod(self.shape)]
        levels = finite(self.parts, "weight.quant_map", self.parts.read("weight.quant_map"))
        return (levels[codes.int()] * _spread(self._absmax(), self.scheme.group_size, len(codes))).reshape(self.shape)

    def _absmax(self) -> Tensor:
        """The largest size in each block, float32."""
        absmax = self.parts.read("weight.absmax")
        if "nested_blocksize" not in self.state:
            return finite(self.parts, "weight.absmax", absmax)
        largest, levels = (finite(self.parts, part, self.parts.read(part)) for part in NESTED)
        scales = _spread(largest, self.state["nested_blocksize"], len(absmax))
        return levels[absmax.int()] * scales + torch.tensor(float(self.state["nested_offset"]))


def _spread(values: Tensor, size: int | None, count: int) -> Tensor:
    """Each value `size` times, and of all the first `count`."""
    return values.repeat_interleave(size or count)[:count]


def _state(parts: Parts, part: str) -> dict[str, Any]:
    """What a layer says of itself."""
    try:
        state = json.loads(bytes(parts.read(part).tolist()).decode())
        counts = [state[name] for name in ("blocksize", "nested_blocksize") if name in state]
        counts += state["shape"]
        if not all(type(count) is int and count > 0 for count in counts):
            raise ValueError("a size that is none")
        if "nested_blocksize" in state and not math.isfinite(float(state["nested_offset"])):
            raise ValueError("an offset that is none")
        return state
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise parts.wrong(part, f"does not describe a quantized weight ({type(error).__name__}: {error})") from error

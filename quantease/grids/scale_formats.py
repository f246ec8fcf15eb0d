"""The number formats that scales are stored in: float16, float32, E8M0 (powers of two) and E4M3 (8-bit floats).

Everything is computed with the stored values, so that what is measured is what a checkpoint would give.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT16_NORMAL = 2.0**-14  # the smallest float16 with all 11 bits: below it a scale loses some


@dataclass(frozen=True)
class ScaleFormat:
    """A format of positive numbers.

    Attributes:
        name: as in the literature.
        bits: of a number.
        smallest: the smallest number that a scale may be. No scale is rounded to zero, as weights are divided by it.
        largest: the largest one.
        saturates: larger values become `largest`, as hardware has it; otherwise they are refused.
    """

    name: str
    bits: int
    smallest: float
    largest: float
    saturates: bool = False

    def storable(self, values: Tensor) -> Tensor:
        """`values` as they are stored, in their own dtype; a value below `smallest` may become zero.

        Raises:
            ValueError: a value is not finite, or too large for a format that does not saturate.
        """
        if self.saturates:
            values = values.clamp(max=self.largest)  # NaN stays NaN
        stored = self._rounded(values)
        if not holds(torch.isfinite(stored)):
            hint = "take scale_bits=32, or look for" if self is FP16 else "look for"
            raise ValueError(f"a scale is not finite in {self.name}: {hint} infinite or NaN weights")
        return stored

    def _rounded(self, values: Tensor) -> Tensor:
        if self is FP32:
            return values
        if self is E8M0:
            return _power_of_two(values)
        return values.to(torch.float16 if self is FP16 else torch.float8_e4m3fn).to(values.dtype)

    def to_bytes(self, values: Tensor) -> Tensor:
        """Numbers of an 8-bit format as their bytes, uint8; of the others as they are, in float32.

        (Scales of 16 bits are kept in float32 because parts of a layer may have been solved times powers of two.)

        Raises:
            ValueError: a number is none of the format's.
        """
        if self.bits != 8:
            return values
        if self is E8M0:
            stored = (torch.frexp(values).exponent - 1 + E8M0_BIAS).clamp(0, 2 * E8M0_BIAS).to(torch.uint8)
        else:
            stored = values.clamp(max=self.largest).to(torch.float8_e4m3fn).view(torch.uint8)
        if not holds(self.from_bytes(stored) == values):
            raise ValueError(f"a scale is not a number of {self.name}")
        return stored

    def from_bytes(self, stored: Tensor) -> Tensor:
        """The inverse of `to_bytes`, float32."""
        if self.bits != 8:
            return stored
        if self is E8M0:
            return torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.to(torch.int32) - E8M0_BIAS)
        return stored.view(torch.float8_e4m3fn).float()


def holds(condition: Tensor) -> bool:
    """Whether it holds everywhere. Of a tensor on the meta device, which has a size and no values, nothing else is known."""
    return condition.is_meta or bool(condition.all())


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two that is not above each value; zero for zero."""
    power = torch.ldexp(torch.ones_like(values), torch.frexp(values).exponent - 1)
    return torch.where(torch.isfinite(values) & (values > 0), power, values)


E8M0_BIAS = 127
FP16 = ScaleFormat("float16", 16, 2.0**-24, 65504.0)  # down to its subnormal numbers
FP32 = ScaleFormat("float32", 32, torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
# 2^-127 is a number of E8M0, too, but no normal one of float32, in which a GPU may take it for zero.
E8M0 = ScaleFormat("E8M0", 8, 2.0**-126, 2.0**127, saturates=True)
E4M3 = ScaleFormat("E4M3", 8, 2.0**-9, 448.0, saturates=True)  # without infinities: float8_e4m3fn


def float_format(bits: int) -> ScaleFormat:
    """The floating-point format of 16 or 32 bits."""
    return FP16 if bits == 16 else FP32

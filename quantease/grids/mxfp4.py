"""MXFP4 of the OCP Microscaling Formats (MX) specification 1.0: E2M1 in groups of 32 with a power of two each (E8M0).

    scale = 2^(floor(log2(max |w|)) - 2)

where 2 is the exponent of E2M1's largest level: a max |w| of 6 to 8 times the scale is cut to 6. That is Section 6.3 of the
specification and torchao's default (`to_mx`, ScaleCalculationMode.FLOOR), whose codes and scales these are; other tools
round the exponent otherwise. Here it is at least -126, as float32 has no normal number below, and a group of zeros has a
scale of 1, where torchao has 2^-127.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantease.grids import e2m1
from quantease.grids.levels import check_request
from quantease.grids.scale_formats import E8M0, ScaleFormat

if TYPE_CHECKING:
    from quantease.grid import GridSpec

EXPONENT = 2  # of the largest level, 6 = 1.5 * 2^2


@dataclass(frozen=True)
class MXFP4:
    """Groups of 32 columns."""

    name = "mxfp4"
    levels, thresholds = e2m1.LEVELS, e2m1.THRESHOLDS
    scales_of_tensor = False

    def check(self, spec: "GridSpec") -> None:
        check_request(spec, self.name, bits=4, group_size=32, own_scales=True)

    def scale_format(self, spec: "GridSpec") -> ScaleFormat:  # noqa: ARG002
        return E8M0

    def tensor_scale(self, weight: Tensor) -> Tensor | None:  # noqa: ARG002
        return None

    def group_scale(self, largest: Tensor, spec: "GridSpec", tensor_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        # The power first, then its division: a quotient could be a subnormal number, with another power of two.
        scale = (E8M0.storable(largest) / 2**EXPONENT).clamp(min=E8M0.smallest)
        return torch.where(largest > 0, scale, 1.0)

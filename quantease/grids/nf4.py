"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, Appendix E).

16 levels from -1 to 1, quantiles of the normal distribution with zero among them; the scale of a group is its largest |w|.
The reference is bitsandbytes (`quantize_4bit`, nf4, without nested quantization of the scales), whose levels these are to
the last bit: equal codes and scales with scale_bits=32. It keeps scales in float32; with scale_bits=16 they are rounded to
float16, as those of the integer grid, before weights are. A middle between two levels goes down, as there. A group of
zeros has a scale of 1, where bitsandbytes has 0.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantease.grids.levels import check_request, thresholds_of
from quantease.grids.scale_formats import ScaleFormat, float_format

if TYPE_CHECKING:
    from quantease.grid import GridSpec

LEVELS = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)
THRESHOLDS = thresholds_of(LEVELS)


@dataclass(frozen=True)
class NF4:
    """Groups of any size; bitsandbytes takes 64."""

    name = "nf4"
    levels, thresholds = LEVELS, THRESHOLDS
    scales_of_tensor = False

    def check(self, spec: "GridSpec") -> None:
        check_request(spec, self.name, bits=4, group_size=None, own_scales=False)

    def scale_format(self, spec: "GridSpec") -> ScaleFormat:
        return float_format(spec.scale_bits)

    def tensor_scale(self, weight: Tensor) -> Tensor | None:  # noqa: ARG002
        return None

    def group_scale(self, largest: Tensor, spec: "GridSpec", tensor_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        form = self.scale_format(spec)
        return torch.where(largest > 0, form.storable(largest).clamp(min=form.smallest), 1.0)

"""NVFP4: E2M1 in groups of 16, with a scale in E4M3 each, under one float32 for the whole layer.

    tensor scale = 448 * 6 / max |w| of the layer,
    stored scale = E4M3(tensor scale * (max |w| of the group / 6)),    scale = stored scale / tensor scale,

with 448 the largest number of E4M3 and 6 that of E2M1, so that the largest scale of a layer is 448. Order of operations,
and the stored scale of 0.125 where it would be zero, are those of compressed-tensors (`generate_gparam`,
`calculate_qparams`), whose codes and scales these are to the last bit. A layer's rows share the tensor scale, so they are
not independent.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantease.grids import e2m1
from quantease.grids.levels import check_request
from quantease.grids.scale_formats import E4M3, ScaleFormat

if TYPE_CHECKING:
    from quantease.grid import GridSpec

IN_PLACE_OF_ZERO = 0.125  # the epsilon of E4M3


@dataclass(frozen=True)
class NVFP4:
    """Groups of 16 columns."""

    name = "nvfp4"
    levels, thresholds = e2m1.LEVELS, e2m1.THRESHOLDS
    scales_of_tensor = True

    def check(self, spec: "GridSpec") -> None:
        check_request(spec, self.name, bits=4, group_size=16, own_scales=True)

    def scale_format(self, spec: "GridSpec") -> ScaleFormat:  # noqa: ARG002
        return E4M3

    def tensor_scale(self, weight: Tensor) -> Tensor | None:
        largest = weight.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny)
        return (E4M3.largest * e2m1.LARGEST / largest).nan_to_num(nan=1.0, posinf=1.0)  # 1: all weights are zero

    def group_scale(self, largest: Tensor, spec: "GridSpec", tensor_scale: Tensor | None) -> Tensor:  # noqa: ARG002
        assert tensor_scale is not None
        stored = E4M3.storable(tensor_scale * (largest / e2m1.LARGEST))
        return torch.where(stored == 0, IN_PLACE_OF_ZERO, stored) / tensor_scale

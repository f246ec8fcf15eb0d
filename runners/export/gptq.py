"""The layout of GPTQ checkpoints, which AutoGPTQ began: 2, 3, 4 or 8 bits, act-order by `g_idx`.

    weight[o, i] = scales[g_idx[i], o] * (q[i, o] - z[g_idx[i], o]),   q packed along i, z along o, both in int32

Version 1 stores z - 1, so it has no place for z = 0; where some zero point is 0 it is version 2, which stores z
(`checkpoint_format` says which). Scales are float16. Source: AutoGPTQ `qlinear_cuda_old.py`, GPTQModel `checkpoint_format`.
"""

from typing import Any

import torch
from torch import Tensor

from quantease.grids.uniform import UniformGrid
from runners.export.layouts import (
    CannotHold,
    StoredLayer,
    all_layers,
    group_size_of,
    is_scattered,
    plain_grid,
    whole_zeros,
)
from runners.formats.words import pack_words
from runners.quantization.finished_blocks import FinishedBlocks

BITS = (2, 3, 4, 8)
MULTIPLE = 32  # codes that fill whole words at any of these bits
OTHERS = "format=dense can hold it"
ANY_SIZE = "format=compressed_tensors or format=dense can hold it"


def has_zero(blocks: FinishedBlocks) -> bool:
    """Whether a zero point of some layer is 0."""
    grids = (layer.grid for layer in all_layers(blocks))
    return any(isinstance(grid, UniformGrid) and bool((grid.zero == 0).any()) for grid in grids)


class Gptq:
    """Codes, zero points, scales and the group of each column.

    Args:
        has_zero: whether a zero point of some layer is 0, so that the version is 2.
    """

    name = "gptq"

    def __init__(self, has_zero: bool) -> None:
        self.version = 2 if has_zero else 1

    def tensors(self, stored: StoredLayer) -> dict[str, Tensor]:
        """As for `ExportLayout`."""
        bits, codes = stored.layer.grid.spec.bits, stored.layer.codes
        scale = plain_grid(stored, OTHERS)
        if bits not in BITS:
            raise CannotHold(f"{stored.name} has {bits} bits, the format has 2, 3, 4 or 8: {ANY_SIZE}")
        if any(size % MULTIPLE for size in codes.shape):
            shape = " x ".join(map(str, codes.shape))
            raise CannotHold(f"{stored.name} is {shape}, and the format takes multiples of {MULTIPLE}: {ANY_SIZE}")
        half = scale.to(torch.float16)
        if not torch.equal(half.float(), scale) and not _is_rounding(stored, half, scale):
            raise CannotHold(f"the scales of {stored.name} are not those of float16: {ANY_SIZE}")
        zero = whole_zeros(stored, OTHERS) - (1 if self.version == 1 else 0)
        return {
            "qweight": pack_words(codes, bits).T.contiguous(),
            "qzeros": pack_words(zero.T, bits),
            "scales": half.T.contiguous(),
            "g_idx": stored.layer.grid.group.to(torch.int32),
        }

    def config(self, layers: list[StoredLayer], ignored: list[str]) -> dict[str, Any]:
        """As for `ExportLayout`. What is quantized is named by its place in a block, so what is ignored need not be.

        Raises:
            CannotHold: layers differ in bits, group size or symmetry, or blocks in which of their layers are quantized.
        """
        kinds = {(each.layer.grid.spec.bits, group_size_of(each), each.layer.grid.spec.symmetric) for each in layers}
        if len(kinds) > 1:
            raise CannotHold(f"the layers are of {len(kinds)} kinds of grids, the format has one: {ANY_SIZE}")
        ((bits, group_size, symmetric),) = kinds
        quantized = {_in_block(each.name) for each in layers}
        if left := next((name for name in ignored if _in_block(name) in quantized), None):
            raise CannotHold(f"{left} is not quantized, and the format quantizes it in all blocks or none: {ANY_SIZE}")
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": any(is_scattered(each) for each in layers),
            "sym": symmetric,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "lm_head": False,
            "modules_in_block_to_quantize": [sorted(quantized)],
        }


def _is_rounding(stored: StoredLayer, half: Tensor, scale: Tensor) -> bool:
    """Whether the scales were those of float16 before others were folded into them, and lose no more than its last digit."""
    was_half = stored.layer.grid.spec.scale_bits == 16
    return was_half and bool(((half.float() - scale).abs() <= 2.0**-11 * scale).all())


def _in_block(name: str) -> str:
    """The name of a layer within its decoder block: `self_attn.q_proj`."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[place + 1 :])

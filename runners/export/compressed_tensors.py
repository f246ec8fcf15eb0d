"""The layout `pack-quantized` of compressed-tensors, which vLLM and transformers read: 2 to 8 bits, rows or groups.

    weight = scale * (q - z),   q and z stored less 2^(bits - 1), packed into int32 along the row (q) and the column (z)

Scales are stored in float32 where the model does not compute in float16: a reader multiplies in the dtype of the scales, and
another product than the run's would be rounded twice. Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

from typing import Any

import torch
from torch import Tensor

from runners.export.layouts import CannotHold, StoredLayer, group_size_of, is_scattered, plain_grid, whole_zeros
from runners.formats.words import pack_words

OTHERS = "format=dense can hold it"
ACT_ORDER = "format=gptq or format=dense can hold it"


class CompressedTensors:
    """One tensor each for codes, scales, zero points and the shape of a layer."""

    name = "compressed_tensors"

    def tensors(self, stored: StoredLayer) -> dict[str, Tensor]:
        """As for `ExportLayout`."""
        layer, bits = stored.layer, stored.layer.grid.spec.bits
        scale = plain_grid(stored, OTHERS)
        if is_scattered(stored):
            raise CannotHold(f"the columns of a group of {stored.name} are not neighbors: {ACT_ORDER}")
        found = {
            "weight_packed": pack_words(layer.codes, bits),
            "weight_scale": scale.to(_scale_dtype(scale, stored.dtype)),
            "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
        }
        if not layer.grid.spec.symmetric:
            found["weight_zero_point"] = pack_words(whole_zeros(stored, OTHERS).T, bits).T.contiguous()
        return found

    def config(self, layers: list[StoredLayer], ignored: list[str]) -> dict[str, Any]:
        """As for `ExportLayout`."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for stored in layers:
            spec = stored.layer.grid.spec
            groups.setdefault((spec.bits, spec.symmetric, group_size_of(stored)), []).append(stored.name)
        one = len(groups) == 1
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{place}": {
                    "targets": ["Linear"] if one else names,
                    "weights": _weights(bits, symmetric, group_size),
                }
                for place, ((bits, symmetric, group_size), names) in enumerate(groups.items())
            },
            "ignore": ignored,
            # transformers, which otherwise refuses zero points; it reads layers of unlike grids as if all were of the first
            **({"dequantize": True} if one else {}),
        }


def _weights(bits: int, symmetric: bool, group_size: int) -> dict[str, Any]:
    of_rows = group_size == -1
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if of_rows else "group",
        "group_size": None if of_rows else group_size,
        "dynamic": False,
    }


def _scale_dtype(scale: Tensor, dtype: torch.dtype) -> torch.dtype:
    """float16 where that changes no weight: it holds the scales, and the model computes in it."""
    half = scale.to(torch.float16)
    fits = torch.equal(half.float(), scale) and dtype == torch.float16
    return torch.float16 if fits else torch.float32

"""Quantized layers as the tensors of a safetensors file, and back, without the loss of a bit.

The format is our own because the published ones cannot hold every method's answer (fractional zero points, column scales,
sparse outliers), and because the metric `checkpoint/sha256` of stored results is the digest of exactly these bytes.
"""

import json
from typing import Any

import torch
from torch import Tensor

from quantease.grid import Grid, GridSpec
from quantease.grids.formats import FORMATS
from quantease.grids.levels import LevelGrid
from quantease.grids.rotation import Rotation
from quantease.grids.uniform import UniformGrid
from quantease.layer import QuantizedLayer
from quantease.sparse import Outliers

BYTE = 8  # codes whose bits of one plane share a byte


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes as bit planes, which take `bits` bits per code whether or not that divides 8.

    Args:
        codes: uint8 of any shape, each less than 2**bits.
        bits: per code.

    Returns:
        uint8 (bits, ceil(count / 8)). Bit k of byte n of plane b is bit b of code 8 n + k.
    """
    flat = codes.flatten()
    # -n % 8 zeros fill the last byte; they are cut off when the codes are unpacked.
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % BYTE)).reshape(-1, BYTE)
    planes = []
    for bit in range(bits):
        plane = torch.zeros(len(padded), dtype=torch.uint8, device=codes.device)
        for place in range(BYTE):
            plane |= ((padded[:, place] >> bit) & 1) << place
        planes.append(plane)
    return torch.stack(planes)


def unpack_codes(planes: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes, uint8 of `shape` (out, in), from the planes (bits, ceil(count / 8)) of `pack_codes`."""
    padded = torch.zeros(planes.shape[1], BYTE, dtype=torch.uint8, device=planes.device)
    for bit, plane in enumerate(planes):
        for place in range(BYTE):
            padded[:, place] |= ((plane >> place) & 1) << bit
    return padded.flatten()[: shape[0] * shape[1]].reshape(shape)


def pack(layers: dict[str, QuantizedLayer]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The quantized layers of a decoder block, by name, as the tensors and the metadata of a safetensors file."""
    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    for name, layer in layers.items():
        mine = _tensors(layer)
        tensors |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in mine.items()}
        words[name] = _words(layer)
    return tensors, {"layers": json.dumps(words)}  # one entry, as safetensors does not keep the order of several


def packed_bytes(layer: QuantizedLayer) -> int:
    """The size of the tensors that `pack` makes of a layer, whose own may be on the meta device."""
    return sum(tensor.nbytes for tensor in _tensors(layer).values())


def unpack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, QuantizedLayer]:
    """The quantized layers that `pack` has packed, on the device of the tensors."""
    return {
        name: _layer({key: tensors[f"{name}.{key}"] for key in words["tensors"]}, words)
        for name, words in json.loads(metadata["layers"]).items()
    }


def _tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    tensors = {
        "codes": pack_codes(layer.codes, layer.grid.spec.bits),
        **layer.grid.to_tensors(),
    }
    if layer.column_scale is not None:
        tensors["column_scale"] = layer.column_scale
    if layer.rotation is not None:
        tensors["rotation_scale"] = layer.rotation.scale
    if layer.outliers is not None:
        tensors["outlier_rows"] = layer.outliers.rows.to(torch.int32)
        tensors["outlier_columns"] = layer.outliers.columns.to(torch.int32)
        tensors["outlier_values"] = layer.outliers.values
    return tensors


def _words(layer: QuantizedLayer) -> dict[str, Any]:
    outliers = layer.outliers
    words = {
        "tensors": list(_tensors(layer)),
        "shape": list(layer.codes.shape),
        "grid": _grid_words(layer.grid.spec),
        "stored_bits_per_group": layer.grid.stored_bits_per_group if isinstance(layer.grid, UniformGrid) else None,
        "outliers": outliers and {"whole_columns": outliers.whole_columns, "value_bits": outliers.value_bits},
    }
    # Only where there is one, so that the files of all other layers, and their digests, are what they have always been.
    words |= {"exponent": layer.exponent} if layer.exponent else {}
    return words | ({} if layer.rotation is None else {"rotation_seed": layer.rotation.seed})


def _grid_words(spec: GridSpec) -> dict[str, Any]:
    """The request, with the name of a format if there is one: files on the uniform grid are what they have always been."""
    words = {name: value for name, value in vars(spec).items() if name != "format"}
    return words if spec.format is None else words | {"format": spec.format.name}


def _grid(tensors: dict[str, Tensor], words: dict[str, Any]) -> Grid:
    request = dict(words["grid"])
    if (name := request.pop("format", None)) is None:
        return UniformGrid.from_tensors(tensors, GridSpec(**request), words["stored_bits_per_group"])
    return LevelGrid.from_tensors(tensors, GridSpec(**request, format=FORMATS[name]), FORMATS[name])


def _layer(tensors: dict[str, Tensor], words: dict[str, Any]) -> QuantizedLayer:
    codes = unpack_codes(tensors["codes"], tuple(words["shape"]))
    grid = _grid(tensors, words)
    outliers = None
    if words["outliers"] is not None:
        places = (tensors["outlier_rows"].long(), tensors["outlier_columns"].long())
        outliers = Outliers(*places, tensors["outlier_values"], **words["outliers"])
    seed = words.get("rotation_seed")
    rotation = None if seed is None else Rotation(seed, tensors["rotation_scale"])
    scale, exponent = tensors.get("column_scale"), words.get("exponent", 0)
    return QuantizedLayer(codes, grid, outliers, scale, exponent, rotation=rotation)

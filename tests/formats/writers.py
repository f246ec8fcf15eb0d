"""Layers that our methods have quantized, written in the layouts of other tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantease.grid import GridSpec
from quantease.grids.levels import LevelGrid
from quantease.grids.uniform import UniformGrid
from quantease.layer import QuantizedLayer
from runners.quantization.finished_blocks import FinishedBlocks

WORD = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # which of eight columns is where in a word, lowest bits first
Tensors = dict[str, Tensor]
Layout = tuple[Callable[[QuantizedLayer], Tensors], Callable[[GridSpec], dict[str, Any]]]  # a layer's, and the config's


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, count) as int32 words (rows, ...), bit by bit: a stream that begins at the lowest bit."""
    rows, count = codes.shape
    stream = (codes.long()[:, :, None] >> torch.arange(bits)) & 1
    stream = torch.nn.functional.pad(stream.reshape(rows, count * bits), (0, -count * bits % WORD))
    unsigned = (stream.reshape(rows, -1, WORD) << torch.arange(WORD)).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def gptq_tensors(layer: QuantizedLayer, version: int) -> Tensors:
    """One layer in GPTQ's layout."""
    grid = layer.grid
    assert isinstance(grid, UniformGrid)
    bits = grid.spec.bits
    return {
        "qweight": words(layer.codes, bits).T.contiguous(),
        "qzeros": words(grid.zero.T.round().long() - int(version == 1), bits),
        "scales": grid.scale.T.half().contiguous(),
        "g_idx": grid.group.int(),
    }


def gptq_config(spec: GridSpec, version: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size or -1,
        "desc_act": True,
        "sym": spec.symmetric,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
    }


def awq_tensors(layer: QuantizedLayer) -> Tensors:
    """One layer of 4 bits in AWQ's layout `gemm`."""
    grid = layer.grid
    assert isinstance(grid, UniformGrid)
    codes, zeros = (
        rows.T.long().reshape(rows.shape[1], -1, 8)[:, :, AWQ_ORDER].flatten(1) for rows in (layer.codes, grid.zero)
    )
    return {"qweight": words(codes, 4), "qzeros": words(zeros, 4), "scales": grid.scale.T.half().contiguous()}


def awq_config(spec: GridSpec) -> dict[str, Any]:
    size = spec.group_size or -1
    return {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}


def bitsandbytes_tensors(layer: QuantizedLayer) -> Tensors:
    """One layer of NF4 in bitsandbytes' layout; its groups are blocks of the row after row of the weight."""
    grid = layer.grid
    assert isinstance(grid, LevelGrid)
    (out, columns), (_, groups) = layer.codes.shape, grid.scale.shape
    upper, lower = layer.codes.flatten()[::2], layer.codes.flatten()[1::2]
    state = {"quant_type": "nf4", "blocksize": columns // groups, "dtype": "float32", "shape": [out, columns]}
    return {
        "weight": (upper << 4 | lower)[:, None].contiguous(),
        "weight.absmax": grid.scale.flatten(),
        "weight.quant_map": grid.format.levels.clone(),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def bitsandbytes_config(spec: GridSpec) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def naive_tensors(layer: QuantizedLayer) -> Tensors:
    """One layer in the layout `naive-quantized` of compressed-tensors: a byte for each code, less the middle."""
    grid = layer.grid
    assert isinstance(grid, UniformGrid)
    middle = 2 ** (grid.spec.bits - 1)
    return {
        "weight": (layer.codes.int() - middle).to(torch.int8),
        "weight_scale": grid.scale.clone(),
        "weight_zero_point": (grid.zero.int() - middle).to(torch.int8),
    }


def naive_config(spec: GridSpec) -> dict[str, Any]:
    weights = {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric}
    weights |= {"strategy": "group" if spec.group_size else "channel", "group_size": spec.group_size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": groups}


LAYOUTS: dict[str, Layout] = {
    "gptq v1": (lambda layer: gptq_tensors(layer, 1), lambda spec: gptq_config(spec, 1)),
    "gptq v2": (lambda layer: gptq_tensors(layer, 2), lambda spec: gptq_config(spec, 2)),
    "awq": (awq_tensors, awq_config),
    "bitsandbytes": (bitsandbytes_tensors, bitsandbytes_config),
    "naive": (naive_tensors, naive_config),
}


def write_packed(original: Path, run: Path, folder: Path, layout: str, blocks: str) -> None:
    """A checkpoint of the codes that a run has kept, in another tool's layout.

    Args:
        original: the folder of the unquantized model.
        run: the run's folder, with its `checkpoint/`.
        layout: one of LAYOUTS.
        blocks: what the names of its decoder blocks begin with.
    """
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    finished, (tensors_of, config_of) = FinishedBlocks(run, {}), LAYOUTS[layout]
    spec = None
    for index in range(len(list((run / "checkpoint").glob("block-*.safetensors")))):
        for name, layer in finished.layers(index, "cpu").items():
            spec = layer.grid.spec
            del tensors[f"{blocks}{index}.{name}.weight"]
            tensors |= {f"{blocks}{index}.{name}.{part}": tensor for part, tensor in tensors_of(layer).items()}
    assert spec is not None
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": config_of(spec)}))

"""Layers that our methods have quantized, written in the layouts of other tools."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantease.grids.uniform import UniformGrid
from quantease.layer import QuantizedLayer
from runners.quantization.finished_blocks import FinishedBlocks

WORD = 32


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, count) as int32 words (rows, ...), bit by bit: a stream that begins at the lowest bit."""
    rows, count = codes.shape
    stream = (codes.long()[:, :, None] >> torch.arange(bits)) & 1
    stream = torch.nn.functional.pad(stream.reshape(rows, count * bits), (0, -count * bits % WORD))
    unsigned = (stream.reshape(rows, -1, WORD) << torch.arange(WORD)).sum(-1)
    return torch.where(unsigned >= 2**31, unsigned - 2**32, unsigned).to(torch.int32)


def gptq_tensors(layer: QuantizedLayer, version: int) -> dict[str, Tensor]:
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


def write_gptq(original: Path, run: Path, folder: Path, version: int, blocks: str) -> None:
    """A checkpoint of the codes that a run has kept, in GPTQ's layout.

    Args:
        original: the folder of the unquantized model.
        run: the run's folder, with its `checkpoint/`.
        blocks: what the names of its decoder blocks begin with.
    """
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    finished = FinishedBlocks(run, {})
    spec = None
    for index in range(len(list((run / "checkpoint").glob("block-*.safetensors")))):
        for name, layer in finished.layers(index, "cpu").items():
            spec = layer.grid.spec
            del tensors[f"{blocks}{index}.{name}.weight"]
            mine = gptq_tensors(layer, version)
            tensors |= {f"{blocks}{index}.{name}.{part}": tensor for part, tensor in mine.items()}
    assert spec is not None
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    entries: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": spec.bits,
        "group_size": spec.group_size or -1,
        "desc_act": True,
        "sym": spec.symmetric,
        "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
    }
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entries}))

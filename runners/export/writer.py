"""Writes a run's weights as a Hugging Face folder, one decoder block at a time.

What was quantized is in a layout of other tools, or dequantized; the rest is what the model's files hold.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantease.layer import QuantizedLayer
from runners.errors import InputError
from runners.export.layouts import CannotHold, ExportLayout, StoredLayer
from runners.kept.run import KeptRun
from runners.models.blocks import InMemoryModel, linear_layers, replace_weights
from runners.models.checkpoint import load
from runners.models.shards import INDEX, Shards
from runners.models.streaming import StreamedModel, blocks_prefix, open_model
from runners.models.weight_names import match_names
from runners.storage.files import write, write_tensors

# What a folder of a model holds besides its weights: tokenizer, settings of generation, licenses.
BESIDE = (
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "generation_config.json",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
)
CPU = torch.device("cpu")


@dataclass
class _Files:
    """The safetensors files of the export, in the order in which they are written, and the index over them."""

    folder: Path
    names: list[str] = field(default_factory=list)
    file_of: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        file = f"model-{len(self.names) + 1:05d}.safetensors"
        write_tensors(self.folder / file, tensors, {"format": "pt"})
        self.names.append(file)
        self.file_of |= dict.fromkeys(tensors, file)
        self.size += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        index = {"metadata": {"total_size": self.size}, "weight_map": self.file_of}
        write(self.folder / INDEX, json.dumps(index, indent=2) + "\n")


def write_weights(kept: KeptRun, layout: ExportLayout | None, folder: Path) -> int:
    """Write the weights, config.json, and what else the original folder holds for its tokenizer and for generation.

    Args:
        layout: of the quantized layers; None: their dequantized weights, in the dtype in which the run has measured them.
        folder: exists and is empty.

    Returns:
        The bytes of all tensors.

    Raises:
        InputError: the layout cannot hold the run's layers, or the checkpoint's tensors are not the model's weights.
    """
    source: Any = open_model(kept.checkpoint, kept.model, CPU)
    if layout is None and _is_converted(kept, source):
        source = InMemoryModel(load(kept.checkpoint, kept.model, CPU))
    if isinstance(source, StreamedModel) and not _is_converted(kept, source):
        files, config = _write_streamed(kept, source, layout, folder)
        size = files.size
    elif layout is None:
        size, config = _write_whole(kept, source, folder), {}
    else:
        raise InputError(
            f"the tensors in {kept.checkpoint.folder} are not the model's weights one by one (transformers converts them "
            "when it loads them): format=dense can hold them"
        )
    if not (folder / "config.json").exists():
        original = json.loads((kept.checkpoint.folder / "config.json").read_text(encoding="utf-8"))
        dtype = str(source.model.dtype).removeprefix("torch.")
        named = {"torch_dtype" if "torch_dtype" in original else "dtype": dtype}
        write(folder / "config.json", json.dumps(original | named | config, indent=2) + "\n")
    for pattern in BESIDE:
        for file in kept.checkpoint.folder.glob(pattern):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)
    return size


def _is_converted(kept: KeptRun, source: Any) -> bool:
    """Whether some weight of the decoder blocks is no tensor of the files, as those of experts that transformers joins."""
    stored = match_names(kept.checkpoint.skeleton, Shards.of(kept.checkpoint.folder)).stored
    prefix = blocks_prefix(source.model)
    return any(name not in stored for name, _ in source.model.named_parameters() if name.startswith(prefix))


def _write_streamed(
    kept: KeptRun, source: StreamedModel, layout: ExportLayout | None, folder: Path
) -> tuple[_Files, dict[str, Any]]:
    names = match_names(kept.checkpoint.skeleton, Shards.of(kept.checkpoint.folder))
    prefix, files, layers = blocks_prefix(source.model), _Files(folder), list[StoredLayer]()
    state = source.model.state_dict()
    files.add({names.stored[name]: state[name] for name in names.outside(prefix)})
    for index in range(len(source.blocks)):
        with source.open_block(index) as block:
            quantized = kept.blocks.layers(index, "cpu")
            tensors = {f"{prefix}{index}.{name}": tensor for name, tensor in _weights(block, quantized, layout)}
            places = {name: names.stored[name] for name in tensors if name in names.stored}
            found = {places[name]: tensor for name, tensor in tensors.items() if name in places}
            if layout is not None:
                for stored in _stored(block, quantized, f"{prefix}{index}."):
                    place = names.stored[f"{stored.name}.weight"].removesuffix("weight")
                    parts = _parts(layout, stored)
                    found = {name: tensor for name, tensor in found.items() if name != f"{place}weight"}
                    found |= {f"{place}{part}": tensor for part, tensor in parts.items()}
                    layers.append(stored)
            files.add(found)
    files.finish()
    if layout is None:
        return files, {}
    return files, {"quantization_config": _entry(layout, layers, source.model)}


def _weights(
    block: nn.Module, quantized: dict[str, QuantizedLayer], layout: ExportLayout | None
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a block, by name; without a layout the quantized ones dequantized."""
    if layout is None:
        replace_weights(block, quantized)
    yield from block.state_dict().items()


def _stored(block: nn.Module, quantized: dict[str, QuantizedLayer], prefix: str) -> Iterator[StoredLayer]:
    linear = linear_layers(block)
    for name, layer in quantized.items():
        found = linear[name]
        yield StoredLayer(prefix + name, layer, found.weight.dtype, isinstance(found.module, nn.Linear))


def _parts(layout: ExportLayout, stored: StoredLayer) -> dict[str, Tensor]:
    try:
        return layout.tensors(stored)
    except CannotHold as error:
        raise InputError(f"format={layout.name} cannot hold this run: {error}") from None


def _entry(layout: ExportLayout, layers: list[StoredLayer], model: nn.Module) -> dict[str, Any]:
    names = {stored.name for stored in layers}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        return layout.config(layers, [name for name in linear if name not in names])
    except CannotHold as error:
        raise InputError(f"format={layout.name} cannot hold this run: {error}") from None


def _write_whole(kept: KeptRun, source: Any, folder: Path) -> int:
    """Let transformers write a model whose tensors it converts when it loads them."""
    for index, block in enumerate(source.blocks):
        replace_weights(block, kept.blocks.layers(index, "cpu"))
    source.model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

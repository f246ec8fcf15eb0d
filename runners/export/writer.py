"""Writes a run's weights as a Hugging Face folder, one decoder block at a time.

What was quantized is in a layout of other tools, or dequantized; the rest is what the model's files hold.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantease.layer import QuantizedLayer
from runners.errors import InputError
from runners.export.files import WeightFiles, copy_beside, write_config
from runners.export.folding import Folding, has_column_scales
from runners.export.layouts import CannotHold, ExportLayout, StoredLayer
from runners.kept.run import KeptRun
from runners.models.blocks import BlockSource, InMemoryModel, linear_layers, replace_weights
from runners.models.checkpoint import load
from runners.models.shards import Shards
from runners.models.streaming import StreamedModel, blocks_prefix, open_model
from runners.models.weight_names import match_names

CPU = torch.device("cpu")
Names = dict[str, str]  # of each weight of the model, in the files that it was read from


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        size: bytes of all tensors.
        folded: column scales that were folded into what stands before, in words.
    """

    size: int
    folded: tuple[str, ...] = ()


def write_weights(kept: KeptRun, layout: ExportLayout | None, folder: Path) -> Written:
    """Write the weights, config.json, and what else the original folder holds for its tokenizer and for generation.

    Args:
        layout: of the quantized layers; None: their dequantized weights, in the dtype in which the run has measured them.
        folder: exists and is empty.

    Raises:
        InputError: the layout cannot hold the run's layers, or the checkpoint's tensors are not the model's weights.
    """
    original = kept.checkpoint.folder
    source = open_model(kept.checkpoint, kept.model, CPU)
    names = match_names(kept.checkpoint.skeleton, Shards.of(original)).stored
    if isinstance(source, StreamedModel) and _are_stored(source, names):
        written = _write_streamed(kept, source, names, layout, folder)
    elif layout is None:
        written = _write_whole(kept, source, folder)
    else:
        raise InputError(
            f"the tensors in {original} are not the model's weights one by one (transformers converts them when it loads "
            "them): format=dense can hold them"
        )
    copy_beside(original, folder)
    return written


def _are_stored(source: BlockSource, names: Names) -> bool:
    """Whether each weight of the decoder blocks is a tensor of the files, unlike experts that transformers joins."""
    prefix = blocks_prefix(source.model)
    return all(name in names for name, _ in source.model.named_parameters() if name.startswith(prefix))


def _write_streamed(
    kept: KeptRun, source: StreamedModel, names: Names, layout: ExportLayout | None, folder: Path
) -> Written:
    """Write one decoder block after the other."""
    prefix, files, layers = blocks_prefix(source.model), WeightFiles(folder), list[StoredLayer]()
    state = source.model.state_dict()
    files.add({stored: state[name] for name, stored in names.items() if not name.startswith(prefix)})
    entries: dict[str, Any] = {}
    # Only layouts have no place for column scales. Made here, as it opens a block.
    folding = Folding(source) if layout is not None and has_column_scales(kept.blocks) else None
    try:
        for index in range(len(source.blocks)):
            with source.open_block(index) as block:
                quantized, place = kept.blocks.layers(index, "cpu"), f"{prefix}{index}."
                if folding is not None:
                    quantized = folding.fold(index, place, quantized)
                files.add(_tensors(block, quantized, place, names, layout))
                layers += _stored_layers(block, quantized, place)
        if layout is not None:
            entries["quantization_config"] = layout.config(layers, _ignored(source.model, layers))
    except CannotHold as error:
        assert layout is not None, "only layouts raise it"
        raise InputError(f"format={layout.name} cannot hold this run: {error}") from None
    files.finish()
    write_config(kept.checkpoint.folder, folder, str(source.model.dtype).removeprefix("torch."), entries)
    return Written(files.size, () if folding is None else tuple(folding.folded))


def _tensors(
    block: nn.Module, quantized: dict[str, QuantizedLayer], place: str, names: Names, layout: ExportLayout | None
) -> dict[str, Tensor]:
    """All tensors of a block by their names in files; without a layout its quantized layers are dequantized.

    Args:
        place: what the names of the block's weights begin with in the model.
    """
    if layout is None:
        replace_weights(block, quantized)
    tensors = {names[place + name]: held for name, held in block.state_dict().items() if place + name in names}
    if layout is None:
        return tensors
    for stored in _stored_layers(block, quantized, place):
        weight = names[f"{stored.name}.weight"]
        del tensors[weight]
        tensors |= {weight.removesuffix("weight") + part: held for part, held in layout.tensors(stored).items()}
    return tensors


def _stored_layers(block: nn.Module, quantized: dict[str, QuantizedLayer], place: str) -> Iterator[StoredLayer]:
    linear = linear_layers(block)
    for name, layer in quantized.items():
        found = linear[name]
        yield StoredLayer(place + name, layer, found.weight.dtype, isinstance(found.module, nn.Linear))


def _ignored(model: nn.Module, layers: list[StoredLayer]) -> list[str]:
    """The linear layers of a model that keep their weights."""
    names = {stored.name for stored in layers}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in names]


def _write_whole(kept: KeptRun, source: BlockSource, folder: Path) -> Written:
    """Let transformers write a model whose tensors it converts when it loads them."""
    whole: Any = InMemoryModel(load(kept.checkpoint, kept.model, CPU)) if isinstance(source, StreamedModel) else source
    for index, block in enumerate(whole.blocks):
        replace_weights(block, kept.blocks.layers(index, "cpu"))
    whole.model.save_pretrained(folder)
    return Written(sum(file.stat().st_size for file in folder.glob("*.safetensors")))

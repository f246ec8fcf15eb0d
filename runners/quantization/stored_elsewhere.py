"""What a checkpoint that was quantized elsewhere says of itself: its method, its grid, and the bits of all it stores."""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from runners.formats.detect import main_scheme
from runners.formats.scheme import PackedLayer
from runners.gguf_files.contents import TYPES, GgufFile
from runners.models.blocks import linear_layers, other_matrices
from runners.models.checkpoint import Checkpoint, Model
from runners.models.streaming import blocks_prefix
from runners.models.weight_names import match_names
from runners.results import metrics
from runners.results.layers import LayerRecord, summarize_layers

Metrics = dict[str, Any]
LEFT = "stored as it is, not quantized"


def stored_metrics(checkpoint: Checkpoint, records: list[LayerRecord]) -> Metrics:
    """The metrics of a safetensors checkpoint, from its layers' records."""
    scheme = main_scheme(checkpoint.packed.values())
    packed = sum(layer.parts.bits for layer in checkpoint.packed.values())
    weights = sum(layer.shape[0] * layer.shape[1] for layer in checkpoint.packed.values())
    bits = packed + (checkpoint.parameters - weights) * checkpoint.stored_bits
    return summarize_layers(records, checkpoint.parameters, checkpoint.stored_bits) | {
        metrics.BITS_PER_PARAMETER: bits / checkpoint.parameters,  # embeddings and the head may be quantized, too
        metrics.STORED_METHOD: scheme.method,
        metrics.STORED_LAYOUT: scheme.layout,
        metrics.STORED_GRID: scheme.grid,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "act_order": scheme.act_order,
    }


def stored_records(checkpoint: Checkpoint, blocks: nn.ModuleList) -> Iterator[LayerRecord]:
    """A record for each matrix in the decoder blocks, in their order: what it takes in the files, per weight."""
    names = match_names(checkpoint.skeleton, checkpoint.shards).stored
    prefix = blocks_prefix(checkpoint.skeleton)
    for index, block in enumerate(blocks):
        layers = {name: (f"{name}.weight", layer.weight.shape) for name, layer in linear_layers(block).items()}
        layers |= {name: (name, matrix.shape) for name, matrix in other_matrices(block).items()}
        for name, (weight, shape) in layers.items():
            layer = checkpoint.packed.get(names.get(f"{prefix}{index}.{weight}", ""))
            yield _record(index, name, tuple(shape), layer, checkpoint.stored_bits)


def _record(
    index: int, name: str, shape: tuple[int, ...], layer: PackedLayer | None, stored_bits: float
) -> LayerRecord:
    rows = 1
    for size in shape[:-1]:
        rows *= size
    record: dict[str, Any] = {"block": index, "layer": name, "out_features": rows, "in_features": shape[-1]}
    if layer is None:
        return LayerRecord(**record, relative_error=None, bits_per_weight=stored_bits, left_alone=True, notes=LEFT)
    scheme = layer.scheme
    words = f"{scheme.layout}, {metrics.bits_words(scheme.bits)}, {metrics.group_words(scheme.group_size)}"
    bits = layer.parts.bits / (rows * shape[-1])
    return LayerRecord(**record, relative_error=None, bits_per_weight=bits, notes=words)


def gguf_metrics(model: Model) -> Metrics:
    """The metrics of a GGUF file, from its own tensors: matrices in decoder blocks, and all of them."""
    assert model.gguf is not None, "only called for a GGUF file"
    file = GgufFile(model.gguf)
    inside = [tensor for tensor in file.tensors if tensor.name.startswith("blk.") and len(tensor.shape) > 1]
    kind, types = file.types.most_common(1)[0][0], sorted(set(file.types))
    digits = re.search(r"\d+", kind)
    return {
        metrics.BITS_PER_WEIGHT: _bits(inside),
        metrics.BITS_PER_PARAMETER: _bits(file.tensors),
        metrics.OUTLIER_RATIO: 0.0,
        metrics.STORED_METHOD: "gguf",
        metrics.STORED_LAYOUT: f"GGUF of {', '.join(types)}",
        metrics.STORED_GRID: kind,
        "bits": int(digits.group()) if digits else 16,
        "group_size": TYPES[kind],
    }


def _bits(tensors: list[Any]) -> float:
    return sum(8 * int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)

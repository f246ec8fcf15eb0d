"""Column scales folded into what produces a layer's input, so that formats without a place for them can hold AWQ's layers.

A layer with column scales s computes decode(codes) (x / s). The division moves into the producer of x: into the weight and
the bias of a norm, or into the rows of a linear layer whose outputs go, feature by feature, through what a positive factor
can pass: the product with a gate, ReLU, or attention where there is a value head for each query head.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantease.layer import QuantizedLayer
from runners.export.layouts import CannotHold, all_layers
from runners.export.producers import Producer, find_producer
from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource, LinearLayer, linear_layers
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import InputGroup, input_groups

OTHERS = "format=dense can hold it"
SEQUENCES, TOKENS = 2, 64  # of random tokens that show what produces what
Layers = dict[str, QuantizedLayer]


def has_column_scales(blocks: FinishedBlocks) -> bool:
    """Whether some layer of a run has a scale for each input column."""
    return any(layer.column_scale is not None for layer in all_layers(blocks))


class Folding:
    """Folds the column scales of a model's layers, block after block.

    Args:
        source: the model, none of whose blocks is open.

    Attributes:
        folded: what was folded into what, in words, without the number of the block.
    """

    def __init__(self, source: BlockSource) -> None:
        generator = torch.Generator().manual_seed(0)
        vocabulary = source.model.config.get_text_config().vocab_size
        tokens = torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=generator)
        self._walk = BlockActivations(source, tokens, SEQUENCES)
        self.folded: list[str] = []

    @torch.no_grad()
    def fold(self, index: int, place: str, quantized: Layers) -> Layers:
        """The layers of an open block without column scales; norms, biases and other weights of the block are changed.

        Args:
            index: of the block; those before it have been folded.
            place: what the names of its weights begin with.
            quantized: its layers.

        Raises:
            CannotHold: naming the first layer whose scales nothing can take.
        """
        block = self._walk.blocks[index]
        layers, scaled = linear_layers(block), dict[InputGroup, tuple[Tensor, Producer]]()
        for group in input_groups(self._walk, index):
            if (scale := _scale_of(group, quantized, place)) is not None:
                producer = find_producer(self._walk, index, group)
                if producer is None:
                    raise _refusal(place, group, "and nothing before it in its decoder block can take them")
                scaled[group] = scale, producer
        self._walk.advance(index)  # before anything is changed
        for group, (scale, producer) in scaled.items():
            quantized = _moved(quantized, layers, group, scale, producer)
            if not all(torch.isfinite(parameter).all() for parameter in producer.parameters):
                raise _refusal(place, group, f"which {producer.name} cannot take: {_dtype(block)} has no such numbers")
            words = f"{', '.join(group)} into {producer.name}"
            self.folded += [] if words in self.folded else [words]
        return {name: replace(layer, column_scale=None) for name, layer in quantized.items()}


def _dtype(block: nn.Module) -> str:
    """Of its first parameter, in words."""
    return str(next(block.parameters()).dtype).removeprefix("torch.")


def _refusal(place: str, group: InputGroup, why: str) -> CannotHold:
    return CannotHold(f"{place}{group[0]} has a scale for each input column, {why}: {OTHERS}")


def _scale_of(group: InputGroup, quantized: Layers, place: str) -> Tensor | None:
    """The column scales (in,) that the layers of a group share; None: there are none, or all are 1.

    Raises:
        CannotHold: they differ from layer to layer.
    """
    found = [(name, quantized[name].column_scale) for name in group if name in quantized]
    first = next((scale for _, scale in found if scale is not None), None)
    if first is None:
        return None
    plain = torch.ones_like(first)
    scales = [plain if scale is None else scale for _, scale in found]
    for (name, _), scale in zip(found, scales, strict=True):
        if not torch.equal(scale, scales[0]):
            raise _refusal(place, (name,), f"and {group[0]}, which has the same input, has others")
    return None if torch.equal(scales[0], plain) else scales[0]


def _moved(
    quantized: Layers, layers: Mapping[str, LinearLayer], group: InputGroup, scale: Tensor, producer: Producer
) -> Layers:
    """The layers of a block after the scales of a group have been moved into its producer."""
    factors = 1 / scale
    producer.multiply(factors)  # of a quantized one the bias counts: its weight is not written
    for name in group:
        if name not in quantized:  # it keeps its weights, and its input is now divided, too
            layers[name].replace(layers[name].weight.float() * scale)
    if (layer := quantized.get(producer.name)) is None:
        return quantized
    rows = torch.ones(len(layer.codes))
    rows[producer.rows] = factors
    grid: Any = layer.grid
    return quantized | {producer.name: replace(layer, grid=replace(grid, scale=grid.scale * rows[:, None]))}

"""Decoder blocks and their linear layers. No family of models is known by name."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantease.layer import QuantizedLayer
from runners.errors import InputError


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a decoder block, seen as (out, in) however its module stores the weight."""

    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) in the model's dtype: a view, so that writing to it changes the module."""
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight  # GPT-2 stores (in, out)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.weight.shape[1]

    def replace(self, weight: Tensor) -> None:
        """Write `weight` (out, in) into the module, rounded to its dtype."""
        self.weight.copy_(weight)


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model: the one list of modules with linear layers in its decoder.

    Raises:
        InputError: there is no such list or more than one, or its blocks hold matrices that are not in linear layers.
    """
    blocks = _list_of_blocks(model)
    _refuse_hidden_matrices(model, blocks[0])
    return blocks


def linear_layers(block: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers of a decoder block by name, in the order of its modules."""
    modules = block.named_modules()
    return {name: LinearLayer(module) for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


def replace_weights(block: nn.Module, quantized: dict[str, QuantizedLayer]) -> None:
    """Write the dequantized weights of quantized layers, by name, into a decoder block."""
    layers = linear_layers(block)
    for name, layer in quantized.items():
        layers[name].replace(layer.weight)


def _list_of_blocks(model: Any) -> nn.ModuleList:
    """The list whose modules all hold linear layers; of several the one that is as long as config.json has layers."""
    lists = _outermost_lists(model.get_decoder()) or _outermost_lists(model)  # the decoder has no tower of another kind
    if len(lists) > 1:
        count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        lists = {name: blocks for name, blocks in lists.items() if len(blocks) == count} or lists
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of decoder blocks: it is not a supported decoder")
    if len(lists) > 1:
        raise InputError(
            f"{type(model).__name__} keeps linear layers in several lists of modules ({', '.join(lists)}), none of which is "
            "all of its decoder blocks: this architecture is not supported"
        )
    return next(iter(lists.values()))


def _outermost_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    """Name to list of modules with linear layers each, in no other such list (as a block's experts are)."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside and all(map(linear_layers, module)):
            found[name] = module
    return found


def _refuse_hidden_matrices(model: nn.Module, block: nn.Module) -> None:
    """Refuse weights outside linear layers (fused experts, say), which would stay unquantized without a word."""
    inside = {f"{name}.weight" for name in linear_layers(block)}
    for name, parameter in block.named_parameters():
        if parameter.ndim >= 2 and name not in inside:
            raise InputError(
                f"{type(model).__name__} keeps weights outside linear layers ({name}, {tuple(parameter.shape)}), which "
                "would stay unquantized: this architecture is not supported"
            )


class BlockSource(Protocol):
    """A model, and a way to have the weights of one of its decoder blocks in memory.

    Attributes:
        tuple_lengths: of what each class of blocks returns; 0: no tuple but a tensor. `runners.models.bypass` fills it in.
    """

    model: Any
    blocks: nn.ModuleList
    device: torch.device
    tuple_lengths: dict[type, int]

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Decoder block `index` with its original weights, for the time of the context."""
        ...


class InMemoryModel:
    """A model that is in memory as a whole. Its decoder blocks keep what is written to them, unlike those of a file."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = decoder_blocks(model)
        self.device = next(model.parameters()).device
        self.tuple_lengths: dict[type, int] = {}

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Decoder block `index`, whose weights are in memory anyway."""
        yield self.blocks[index]

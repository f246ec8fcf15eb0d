"""The blocks of a decoder and their linear layers. No family of models is known by name: blocks are found by their class."""

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
    """A linear layer of a block, seen as (out, in), however its module stores the weight."""

    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), in the model's dtype: a view of the module's."""
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight  # GPT-2 stores (in, out)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def replace(self, weight: Tensor) -> None:
        """Write `weight` (out, in) into the module, in its dtype."""
        self.weight.copy_(weight)


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of a decoder's blocks.

    Raises:
        InputError: there is no such list, or its blocks hold matrices that are not in linear layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    names = set(model._no_split_modules or ())
    for module in model.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == count
        if is_list and all(type(block).__name__ in names for block in module):
            _refuse_hidden_matrices(model, module[0])
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder blocks: it is not a supported decoder")


def linear_layers(block: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers of a block by name."""
    modules = block.named_modules()
    return {name: LinearLayer(module) for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


def replace_weights(block: Any, answers: dict[str, QuantizedLayer]) -> None:
    """Give the layers of a block the weights that their codes stand for."""
    layers = linear_layers(block)
    for name, answer in answers.items():
        layers[name].replace(answer.weight)


def _refuse_hidden_matrices(model: nn.Module, block: nn.Module) -> None:
    """Weights outside linear layers (fused experts, say) would stay unquantized without anybody noticing."""
    inside = {f"{name}.weight" for name in linear_layers(block)}
    for name, parameter in block.named_parameters():
        if parameter.ndim >= 2 and name not in inside:
            raise InputError(
                f"{type(model).__name__} keeps weights outside linear layers ({name}, {tuple(parameter.shape)}), which "
                "would stay unquantized: this architecture is not supported"
            )


class BlockSource(Protocol):
    """A model, and the means to have the weights of one of its blocks in memory."""

    model: Any
    blocks: nn.ModuleList
    device: torch.device
    tuple_lengths: dict[type, int]  # what `runners.models.activations` has learned of the blocks

    def open_block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Block `index` with its original weights, for the time of the context."""
        ...


class InMemoryModel:
    """A model that is in memory as a whole. Its blocks keep what is written to them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.blocks = decoder_blocks(model)
        self.device = next(model.parameters()).device
        self.tuple_lengths: dict[type, int] = {}

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Block `index`, which is there anyway."""
        yield self.blocks[index]

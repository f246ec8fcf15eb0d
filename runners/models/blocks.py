"""Decoder blocks and their linear layers. No family of models is known by name."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantease.grid import GridSpec
from quantease.layer import QuantizedLayer
from runners.errors import InputError
from runners.models.experts import ExpertWeight, expert_weights, is_taken_apart, routers, take_apart

SpecOf = Callable[[str], GridSpec | None]  # the grid of a layer, given by its `full_name`; None: it keeps its weights


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a decoder block, seen as (out, in) however its module stores the weight.

    Attributes:
        module: its input is the input of the layer.
        of_expert: where the weight is that `module` does not hold itself.
    """

    module: nn.Module
    of_expert: ExpertWeight | None = None

    @property
    def parameter(self) -> Tensor:
        """The parameter of the model that the weight is, or is a part of."""
        return cast(Tensor, self.module.weight) if self.of_expert is None else self.of_expert.parameter

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) in the model's dtype: a view, so that writing to it changes the module."""
        if self.of_expert is not None:
            return self.of_expert.weight
        weight = self.parameter.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight  # GPT-2 stores (in, out)

    @property
    def stage(self) -> tuple[int, str]:
        """Equal for layers that do the same work side by side, each for its share of the tokens: those of experts."""
        part = self.of_expert
        return (id(self.module), "") if part is None else (id(part.owner), part.name)

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
        InputError: there is no such list or more than one, or two of its blocks share a weight.
    """
    blocks = _list_of_blocks(model)
    _refuse_shared_weights(model, blocks)
    return blocks


def linear_layers(block: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers of a decoder block by name, in the order of its modules. Routers of experts are not among them."""
    left, layers = routers(block), dict[str, LinearLayer]()
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight".lstrip(".") not in left:
            layers[name] = LinearLayer(module)
        elif is_taken_apart(module):
            parts = expert_weights(module)
            layers |= {f"{name}.{part}": LinearLayer(seen, weight) for part, seen, weight in parts}
    return layers


def replace_weights(block: nn.Module, quantized: dict[str, QuantizedLayer]) -> None:
    """Write the dequantized weights of quantized layers, by name, into a decoder block."""
    layers = linear_layers(block)
    for name, layer in quantized.items():
        layers[name].replace(layer.weight)


def other_matrices(block: nn.Module) -> dict[str, Tensor]:
    """The matrices of a decoder block that are not in linear layers, by name: no method is given them.

    These are parameters with two dimensions or more: convolutions, routers, tables of positions, norms that have a row per
    head, and fused experts that cannot be taken apart.
    """
    inside = {id(layer.parameter) for layer in linear_layers(block).values()}
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in inside
    }


def full_name(index: int, layer: str) -> str:
    """What a layer is called in a whole model: `0.self_attn.q_proj`, the columns block and layer of layers.csv.

    Args:
        index: of its decoder block.
        layer: its name inside the block.
    """
    return f"{index}.{layer}"


def check_divisibility(model: Any, spec_of: SpecOf) -> None:
    """Refuse a group size that does not divide the rows of every layer that is to be quantized.

    Raises:
        InputError: naming the first such layer.
    """
    for index, block in enumerate(decoder_blocks(model)):
        for name, layer in linear_layers(block).items():
            if (spec := spec_of(full_name(index, name))) is not None and not spec.divides(layer.in_features):
                if spec.format is not None:
                    raise InputError(
                        f"the groups of grid={spec.format.name}, {spec.group_size} columns each, do not divide the "
                        f"{layer.in_features} inputs of {name} in block {index}: take another grid"
                    )
                raise InputError(
                    f"group_size={spec.group_size} does not divide the {layer.in_features} inputs of {name} in block "
                    f"{index}: take a divisor of every layer's inputs, or group_size=null for one scale per row"
                )


def check_coverage(model: Any) -> str | None:
    """Find the matrices that stay unquantized because they are not in linear layers, but for routers of experts.

    Args:
        model: any causal language model; its weights may be on the meta device.

    Returns:
        A sentence with the share of the decoder blocks' matrices that they are, and the first of them; None: there are none.
    """
    blocks = decoder_blocks(model)
    linear = sum(layer.weight.numel() for block in blocks for layer in linear_layers(block).values())
    others = [
        (index, name, matrix)
        for index, block in enumerate(blocks)
        for name, matrix in other_matrices(block).items()
        if name not in routers(block)  # they are small, and meant to stay
    ]
    if not others:
        return None
    size = sum(matrix.numel() for _, _, matrix in others)
    index, name, matrix = others[0]
    return (
        f"{len(others)} matrices outside linear layers, {size / (linear + size):.0%} of the weights in the decoder blocks, "
        f"stay unquantized and are counted in bits_per_weight at the bits they are stored in (first: {name} "
        f"{tuple(matrix.shape)} in block {index})"
    )


def refuse_left_out(model: Any, warnings: str) -> None:
    """With `warnings=error`, refuse a model of which matrices would stay unquantized, before anything is calibrated.

    Raises:
        InputError: there are such matrices.
    """
    if warnings == "error" and (left := check_coverage(model)) is not None:
        raise InputError(f"{left}; warnings=record goes on and records it")


def refuse_experts(model: Any, method: str) -> None:
    """Refuse a model with experts, for a method that pairs the inputs of every layer in two models.

    Raises:
        InputError: naming the first expert.
    """
    for index, block in enumerate(decoder_blocks(model)):
        for name, layer in linear_layers(block).items():
            if layer.of_expert is not None:
                raise InputError(
                    f"{method} pairs the inputs of every layer in the quantized and the unquantized model, and {name} in "
                    f"block {index} is one of its experts, which receive other tokens in each: take another method"
                )


def _refuse_shared_weights(model: nn.Module, blocks: nn.ModuleList) -> None:
    """Refuse blocks that share a weight: the second would be calibrated, and quantized, on what the first has left of it."""
    owner: dict[int, tuple[int, str]] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            first, first_name = owner.setdefault(id(parameter), (index, name))
            if first != index:
                raise InputError(
                    f"blocks {first} and {index} of {type(model).__name__} share the weight {first_name}, and each block is "
                    "quantized on its own: this architecture is not supported"
                )


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
        take_apart(model)
        self.blocks = decoder_blocks(model)
        self.device = next(model.parameters()).device
        self.tuple_lengths: dict[type, int] = {}

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Decoder block `index`, whose weights are in memory anyway."""
        yield self.blocks[index]

"""What produces the input of linear layers, feature by feature: found by trial, for column scales to be moved there.

No family of models is known by name. Whatever has run before the layers in their decoder block and has as many output
features is tried on the model's own activations, with factors of 1/2 and 2, which are exact in floating point: it is the
producer if the outputs of the block and of all its other linear layers stay what they are.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runners.models.activations import BlockActivations
from runners.models.blocks import linear_layers
from runners.quantization.input_statistics import InputGroup

EXACT = 1e-4  # change of a norm, relative to it, that counts as none where factors are exact
Outputs = dict[str, Tensor]  # of linear layers by name, and of the block itself by ""


@dataclass(frozen=True)
class Producer:
    """A module of a decoder block, or some rows of it, whose output features can be multiplied.

    Attributes:
        rows: the output features.
        adds_one: it is a norm that multiplies by 1 + weight, as Gemma's do.
    """

    name: str
    module: Any
    rows: slice
    adds_one: bool = False

    @property
    def parameters(self) -> list[Tensor]:
        """All that the factors change."""
        return [self.module.weight, *([] if getattr(self.module, "bias", None) is None else [self.module.bias])]

    def multiply(self, factors: Tensor) -> None:
        """Multiply the output features by `factors`, rounded to the dtype of the parameters."""
        for place, parameter in enumerate(self.parameters):
            part, one = parameter.detach()[self.rows], float(self.adds_one and place == 0)
            part.copy_((part.float() + one) * factors.reshape(-1, *[1] * (part.ndim - 1)) - one)


def find_producer(walk: BlockActivations, index: int, group: InputGroup) -> Producer | None:
    """What produces the input of a group of layers, so that column scales of theirs can be moved there.

    Args:
        walk: at the inputs of the block.
        index: of the block, which is open. Its weights are changed for trials and put back.
        group: layers that share an input.

    Returns:
        The nearest one before them; None: there is none.
    """
    layers = linear_layers(walk.blocks[index])
    weights = [layers[name].weight for name in group]
    columns = weights[0].shape[1]
    expected, order = _run(walk, index)
    halves = torch.randint(2, (columns,), generator=torch.Generator().manual_seed(0))
    factors = torch.where(halves.bool(), 0.5, 2.0)
    for producer in _candidates(walk.blocks[index], order, group, columns):
        with _restored([*producer.parameters, *weights]):
            producer.multiply(1 / factors)
            for weight in weights:
                weight.mul_(factors)
            found, _ = _run(walk, index)
        limit = torch.finfo(weights[0].dtype).eps ** 0.5 if producer.adds_one else EXACT
        if all(_is_same(found[name], expected[name], limit) for name in expected if name != producer.name):
            return producer
    return None


def _candidates(block: nn.Module, order: list[str], group: InputGroup, columns: int) -> Iterator[Producer]:
    """Norms and linear layers that run before a group and have as many output features, or a multiple of them."""
    modules: dict[str, Any] = dict(block.named_modules())
    first = min((order.index(member) for member in group if member in order), default=0)
    for name in reversed(order[:first]):
        module = modules[name]
        features = len(module.weight)
        if isinstance(module, nn.Linear) and features % columns == 0:  # joined projections have parts
            yield from (Producer(name, module, slice(row, row + columns)) for row in range(0, features, columns))
        elif module.weight.ndim == 1 and features == columns:
            yield Producer(name, module, slice(None))
            yield Producer(name, module, slice(None), adds_one=True)


def _run(walk: BlockActivations, index: int) -> tuple[Outputs, list[str]]:
    """Send tokens through an open block: the outputs of its linear layers and its own, and its modules as they ran."""
    outputs, order = Outputs(), list[str]()
    block = walk.blocks[index]

    def note(name: str, keeps: bool) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            order.append(name)
            if keeps:
                outputs[name] = output[0] if isinstance(output, tuple | list) else output

        return hook

    with ExitStack() as handles:
        for name, module in block.named_modules():
            is_linear = isinstance(module, nn.Linear)
            if name == "" or is_linear or isinstance(getattr(module, "weight", None), nn.Parameter):
                handles.callback(module.register_forward_hook(note(name, is_linear or name == "")).remove)
        walk.sample(index)
    return outputs, order


@contextmanager
def _restored(tensors: list[Tensor]) -> Iterator[None]:
    """At the end of the context the tensors are what they were."""
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)


def _is_same(found: Tensor, expected: Tensor, limit: float) -> bool:
    return bool((found.float() - expected.float()).norm() <= limit * expected.float().norm())

"""The contract of a layout: how it names and stores a quantized layer, and what it says of all of them in config.json."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from quantease.grids.uniform import UniformGrid
from quantease.layer import QuantizedLayer
from runners.quantization.finished_blocks import FinishedBlocks


class CannotHold(Exception):
    """A layout has no place for something that a layer stores. The message says what, and ends with who can hold it."""


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A quantized layer and where it belongs.

    Attributes:
        name: of the layer in the checkpoint, `model.layers.0.self_attn.q_proj`.
        layer: its codes.
        dtype: of the model's weights while it computes.
        is_linear: whether its module is `nn.Linear`; GPT-2 has another one, whose weight is transposed.
    """

    name: str
    layer: QuantizedLayer
    dtype: torch.dtype
    is_linear: bool = True


class ExportLayout(Protocol):
    """A layout of checkpoints that some tools read."""

    name: str

    def tensors(self, stored: StoredLayer) -> dict[str, Tensor]:
        """The tensors that take the place of the layer's weight, by the last part of their names.

        Raises:
            CannotHold: the layout cannot store this layer.
        """
        ...

    def config(self, layers: list[StoredLayer], ignored: list[str]) -> dict[str, Any]:
        """The entry `quantization_config` of config.json.

        Args:
            layers: all of the checkpoint; their codes may be gone, their grids are there.
            ignored: linear layers outside them, which keep their weights.
        """
        ...


def all_layers(blocks: FinishedBlocks) -> Iterator[QuantizedLayer]:
    """The quantized layers of a run, of which one block at a time is in memory."""
    for index in range(len(blocks.manifests)):
        yield from blocks.layers(index, "cpu").values()


def whole_zeros(stored: StoredLayer, others: str) -> Tensor:
    """The zero points as whole codes, int32 (out, groups).

    Raises:
        CannotHold: some are fractions, as SpQR's are.
    """
    zero = uniform_grid(stored, others).zero
    whole = zero.round()
    most = stored.layer.grid.spec.max_code
    if not torch.equal(whole, zero) or bool((zero < 0).any() or (zero > most).any()):
        raise CannotHold(f"the zero points of {stored.name} are not whole codes of 0 to {most}: {others}")
    return whole.to(torch.int32)


def plain_grid(stored: StoredLayer, others: str) -> Tensor:
    """The scales of a layer that is nothing but codes on a grid, float32 (out, groups).

    Raises:
        CannotHold: it is another grid, there are outliers or column scales, or the layer is not `nn.Linear`.
    """
    layer, grid = stored.layer, uniform_grid(stored, others)
    if not stored.is_linear:
        raise CannotHold(f"{stored.name} is a transposed layer (Conv1D), which is not known to the format: {others}")
    if layer.outliers is not None and len(layer.outliers.values):
        raise CannotHold(f"{stored.name} keeps {len(layer.outliers.values)} outliers in high precision: {others}")
    if layer.rotation is not None:
        raise CannotHold(
            f"{stored.name} was rotated (transform=incoherence), and its codes are in another basis: {others}"
        )
    if layer.column_scale is not None:
        raise CannotHold(f"{stored.name} has a scale for each input column: {others}")
    return grid.scale * 2.0**layer.exponent


def uniform_grid(stored: StoredLayer, others: str) -> UniformGrid:
    """The layer's grid.

    Raises:
        CannotHold: its values are levels that are looked up, as those of NF4.
    """
    grid = stored.layer.grid
    if not isinstance(grid, UniformGrid):
        raise CannotHold(
            f"the grid of {stored.name} is one of levels that are looked up, and the format's is int: {others}"
        )
    return grid


def group_size_of(stored: StoredLayer) -> int:
    """Input columns that share a scale, -1 for the whole row."""
    grid = stored.layer.grid
    # A row that is one group of the size that was asked for is a group, as its neighbors are.
    is_whole = grid.scale.shape[1] == 1 and grid.spec.group_size is None
    return -1 if is_whole else stored.layer.codes.shape[1] // grid.scale.shape[1]


def is_scattered(stored: StoredLayer) -> bool:
    """Whether the columns of a group are not neighbors."""
    columns, groups = len(stored.layer.grid.group), stored.layer.grid.scale.shape[1]
    regular = torch.arange(columns, device=stored.layer.grid.group.device) // -(-columns // groups)
    return not torch.equal(stored.layer.grid.group, regular)

"""The audit of a model: one layer at a time quantized, or one at a time restored, everything else left as it is."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runners.audit.damage import Damage
from runners.audit.walks import Walks
from runners.models.blocks import InMemoryModel, linear_layers
from runners.quantization.finished_blocks import FinishedBlocks

ALL, NONE = "all", "none"  # in the place of a layer's name: all layers of the block, or of the model; no layer

Weights = dict[str, Tensor]  # of a block, by the layer's name, each (out, in)


@dataclass(frozen=True)
class Change:
    """Layers that are quantized, or restored, together.

    Attributes:
        block: the index of their decoder block; None: the whole model.
        layer: the name of the one layer; ALL: all that the run has quantized in the block, or in the model; NONE: none.
        alone: the damage where these layers are quantized and no other.
        restored: the damage where these layers are not quantized and all others are; None: it was not measured.
    """

    block: int | None
    layer: str
    alone: Damage
    restored: Damage | None = None


@dataclass
class LayerAudit:
    """Measures the damage of every layer.

    Args:
        source: the unquantized model, whole in memory; its weights are the same again at the end.
        finished: the quantized layers; those that the run has left alone are not among them, and not audited.
        dtypes: what the run holds each parameter in, by its name; quantized weights are rounded to it, as in the run.
        ids: token ids (windows, length).
        batch_size: windows that go through a block together.
    """

    source: InMemoryModel
    finished: FinishedBlocks
    dtypes: dict[str, torch.dtype]
    ids: Tensor
    batch_size: int
    _original: list[Weights] = field(default_factory=list)
    _quantized: list[Weights] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = {id(parameter): name for name, parameter in self.source.model.named_parameters()}
        for index, block in enumerate(self.source.blocks):
            layers = linear_layers(block)
            quantized = self.finished.layers(index, str(self.source.device))
            # In host memory and in the run's own dtype, which the weights have come from: nothing is lost by that.
            dtypes = {name: self.dtypes[names[id(layers[name].parameter)]] for name in quantized}
            self._quantized.append({name: layer.weight.to(dtypes[name]).cpu() for name, layer in quantized.items()})
            # A copy, as on the CPU and in the same dtype it would otherwise be the weight that is written to.
            self._original.append({name: layers[name].weight.to(dtypes[name], copy=True).cpu() for name in quantized})

    def units(self, by: tuple[str, ...]) -> list[tuple[int, str]]:
        """The block and the layer of every change that is measured; of a whole block ALL in place of the layer."""
        return [
            (index, name)
            for index, weights in enumerate(self._quantized)
            for name in (*(weights if "layer" in by else ()), *([ALL] if "block" in by and weights else []))
        ]

    @torch.no_grad()
    def run(self, by: tuple[str, ...], restore: bool, on_step: Callable[[str], None]) -> list[Change]:
        """Measure every change.

        Args:
            by: `layer`, `block` or both: what is changed at a time.
            restore: measure also with everything quantized but one.
            on_step: called with what was measured: twice, and for every change once, with `restore` twice.

        Returns:
            First the model with no layer quantized, and with all; then the changes in the order of the model.

        Raises:
            InputError: activations are not finite.
        """
        walks = Walks(self.source, self.ids, self.batch_size)
        unquantized = walks.measure()
        on_step("unquantized")
        units = self.units(by)
        alone = list(self._measured(walks, units, self._quantized, self._original, on_step))
        for index, weights in enumerate(self._quantized):
            self._write(index, ALL, weights)
        walks.base()
        quantized = walks.measure()
        on_step("quantized")
        restored: list[Any] = [None] * len(units)
        if restore:
            restored = list(self._measured(walks, units, self._original, self._quantized, on_step))
        for index, weights in enumerate(self._original):
            self._write(index, ALL, weights)
        changes = [
            Change(index, name, one, other) for (index, name), one, other in zip(units, alone, restored, strict=True)
        ]
        return [
            Change(None, NONE, unquantized),
            Change(None, ALL, quantized, unquantized if restore else None),
            *changes,
        ]

    def _measured(
        self,
        walks: Walks,
        units: list[tuple[int, str]],
        changed: list[Weights],
        base: list[Weights],
        on_step: Callable[[str], None],
    ) -> Iterator[Damage]:
        for index, name in units:
            self._write(index, name, changed[index])
            walks.change(index)
            yield walks.measure()
            self._write(index, name, base[index])
            on_step(f"block {index + 1}/{len(self.source.blocks)}  {name}")

    def _write(self, index: int, name: str, weights: Weights) -> None:
        """Write the weights of a layer, or of all, into a block."""
        layers = linear_layers(self.source.blocks[index])
        for one in weights if name == ALL else (name,):
            layers[one].replace(weights[one].to(self.source.device))

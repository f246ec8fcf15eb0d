"""Paired inputs: the quantized and the unquantized model walk through the calibration sequences in step.

    X^_i+1 = Q(B_i)(X^_i)    what the quantized blocks produce, as in `QuantizedInputs`: layers are calibrated on it
    X_i+1  = B_i(X_i)        what the unquantized blocks produce, for the same tokens

Every layer then knows, beside H = mean of x^ x^^T, the cross moment C = mean of (x - x^) x^^T: what its inputs have lost in
the blocks before, seen from what they are now. Methods such as GPTAQ (https://arxiv.org/abs/2504.02692) make up for it.

Of the unquantized model, too, no more than the activations at one decoder block are held, and within the block the layer
inputs of one batch. C depends on the codes of all blocks before, so it is not shared between runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from runners.models.blocks import linear_layers
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import InputGroup, MeasuredGroups


@dataclass
class PairedInputs:
    """The calibration mode of methods with `needs_cross`: quantized inputs, and the unquantized ones beside them.

    The source must give every block its original weights each time it is opened.

    Attributes:
        activations: of the quantized model.
        original: of the unquantized model, for the same calibration sequences in the same batches.
        true_sequential: within a block, too, each input group is measured after the groups before it were quantized.
    """

    activations: CalibrationActivations
    original: CalibrationActivations
    true_sequential: bool = False

    def enter(self, index: int, finished: FinishedBlocks | None) -> None:
        self.activations.advance_to(index, finished)
        self.original.advance_to(index, finished, quantized=False)

    def measure(self) -> Iterator[MeasuredGroups]:
        groups = self.activations.input_groups()
        if not self.true_sequential:
            measured = self._statistics(groups, None)
            self.original.advance()  # now, while the block still has its original weights
            yield measured
            return
        weights = OriginalWeights(self.activations.source.blocks[self.activations.position])
        for groups_of_one_pass in self.activations.passes_in_sequence(groups):
            yield self._statistics(groups_of_one_pass, weights)
        with weights.in_place():
            self.original.advance()

    def leave(self) -> None:
        self.activations.advance()

    def _statistics(self, groups: list[InputGroup], weights: "OriginalWeights | None") -> MeasuredGroups:
        names = [name for name, *_ in groups]

        def originals(batch: int) -> dict[str, Tensor]:
            if weights is None:
                return self.original.layer_inputs(batch, names)
            with weights.in_place():
                return self.original.layer_inputs(batch, names)

        return self.activations.statistics(groups, originals)


class OriginalWeights:
    """A copy of the weights of a decoder block's linear layers, which can take the place of the quantized ones."""

    def __init__(self, block: nn.Module) -> None:
        parameters = {id(layer.parameter): layer.parameter for layer in linear_layers(block).values()}
        self._weights = [(parameter, parameter.detach().clone()) for parameter in parameters.values()]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The block with its original weights for the time of the context; nothing is copied."""
        now = [parameter.data for parameter, _ in self._weights]
        try:
            for parameter, original in self._weights:
                parameter.data = original
            yield
        finally:
            for (parameter, _), data in zip(self._weights, now, strict=True):
                parameter.data = data

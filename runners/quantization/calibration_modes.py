"""Calibration modes: on the inputs of which model the linear layers of a decoder block are calibrated.

Given the decoder blocks B_0 ... B_L-1 and the embedded calibration sequences X_0:

    QuantizedInputs       X_i+1 = Q(B_i)(X_i)    block i sees what the quantized blocks before it produce, errors included
    FullPrecisionInputs   X_i+1 = B_i(X_i)       block i sees the unquantized model; the same for every method and grid

GPTQ (Frantar et al., 2023) and QuantEase (Behdin et al., 2023) calibrate on quantized inputs: a layer can then make up for
the errors of the layers before it. `NoInputs` measures none, for methods that need none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from runners.models.blocks import BlockSource, linear_layers
from runners.models.memory import Memory
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import InputGroup, InputStatistics, MeasuredGroups, StatisticsCache
from runners.timing import Phases

GroupsToSolve = Sequence[tuple[InputGroup, InputStatistics | None]]  # None: nothing is known of the group's input


@dataclass(frozen=True)
class NoActivations:
    """What stands for the activations where there are none: the model, and what is shared by all that runs on it."""

    source: BlockSource
    memory: Memory
    phases: Phases

    def to_host(self) -> None:
        """There is nothing to move to host memory."""


class CalibrationMode(Protocol):
    """Measures the inputs of each decoder block's layers, and advances past the block.

    The harness calls, for each decoder block in order: `enter` while no block is open; then, with the block open, `measure`,
    between whose results it quantizes the layers measured so far; then `leave`. A mode that sends activations through the
    unquantized block does so in `measure`, before its first result; through the quantized one in `leave`. A mode that
    compares the two does both, with a second `CalibrationActivations` in step with the first.

    Attributes:
        activations: what the layers are calibrated on. The harness shares its source, memory and phases.
    """

    @property
    def activations(self) -> CalibrationActivations | NoActivations: ...

    def enter(self, index: int, finished: FinishedBlocks | None, /) -> None:
        """Bring the activations to the inputs of decoder block `index`, which may open the blocks before it.

        Args:
            index: the decoder block that comes next.
            finished: the quantized blocks so far, for a mode that has to send activations through them again.
        """
        ...

    def measure(self) -> Iterator[GroupsToSolve]:
        """The input statistics of the block's layers, each input group once; a layer that no token reaches is in none."""
        ...

    def leave(self) -> None:
        """Advance past the block, whose layers have their quantized weights now."""
        ...


@dataclass
class QuantizedInputs:
    """Every decoder block is calibrated on the outputs of the quantized blocks before it.

    Attributes:
        true_sequential: within a block, too, each input group is measured after the groups before it were quantized.
    """

    activations: CalibrationActivations
    true_sequential: bool = False

    def enter(self, index: int, finished: FinishedBlocks | None) -> None:
        self.activations.advance_to(index, finished)

    def measure(self) -> Iterator[MeasuredGroups]:
        groups = self.activations.input_groups()
        # A group's inputs change with each group quantized before it: true-sequential costs a pass over the data per group.
        for groups_of_one_pass in self.activations.passes_in_sequence(groups) if self.true_sequential else [groups]:
            yield self.activations.statistics(groups_of_one_pass)

    def leave(self) -> None:
        self.activations.advance()


@dataclass
class FullPrecisionInputs:
    """Every decoder block is calibrated on the outputs of the unquantized blocks before it.

    The statistics depend neither on the method nor on the grid, so runs share them through `shared`. Where all are known, no
    activations are made at all. The source must give every block its original weights each time it is opened.
    """

    activations: CalibrationActivations
    shared: StatisticsCache | None = None
    _known: MeasuredGroups | None = field(default=None, init=False, repr=False)

    def enter(self, index: int, _finished: FinishedBlocks | None) -> None:
        self._known = self.shared.get(index) if self.shared else None
        if self._known is None:
            self.activations.advance_to(index)  # through the unquantized blocks, whatever is finished

    def measure(self) -> Iterator[MeasuredGroups]:
        if self._known is not None:
            yield self._known
            return
        index = self.activations.position
        measured = self.activations.statistics(self.activations.input_groups())
        if self.shared:
            self.shared.put(index, measured)
        self.activations.advance()  # now, while the block still has its original weights
        yield measured

    def leave(self) -> None:
        self._known = None  # so that these Hessians are freed before the next block's are loaded


@dataclass
class NoInputs:
    """No inputs are measured and no activations made. Every linear layer is a group of its own, also one never used."""

    activations: NoActivations
    _index: int = field(default=0, init=False, repr=False)

    def enter(self, index: int, _finished: FinishedBlocks | None) -> None:
        self._index = index

    def measure(self) -> Iterator[GroupsToSolve]:
        yield [((name,), None) for name in linear_layers(self.activations.source.blocks[self._index])]

    def leave(self) -> None:
        pass

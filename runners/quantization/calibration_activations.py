"""The activations of the calibration sequences, taken through the model one decoder block after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource, replace_weights
from runners.models.memory import Memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import (
    InputGroup,
    MeasuredGroups,
    input_groups,
    input_statistics,
    passes_in_sequence,
)
from runners.timing import Phases


class CalibrationActivations:
    """The activations that enter one decoder block; they are made when they are first needed.

    Whatever runs a block is tried again with less memory when memory runs out, and its seconds are counted.

    Args:
        source: the model.
        sequences: calibration token ids (sequences, length).
        batch_size: sequences that are held together.
        held_out: token ids (sequences, length) whose statistics are kept apart, to measure errors on unseen inputs.
        memory: how much is held at once; shared with whatever else runs in between.
        phases: counts the seconds under `calibrate` (measuring) and `propagate` (advancing).
        length_one: scale the input of every calibration token to length one before it enters the statistics.

    Attributes:
        position: index of the decoder block that the activations enter.
    """

    def __init__(
        self,
        source: BlockSource,
        sequences: Tensor,
        batch_size: int,
        held_out: Tensor | None = None,
        memory: Memory | None = None,
        phases: Phases | None = None,
        length_one: bool = False,
    ) -> None:
        self.source = source
        self.length_one = length_one
        self.memory = memory or Memory()
        self.phases = phases or Phases(source.device)
        self.position = 0
        self._tokens = sequences, batch_size, held_out
        self._made: BlockActivations | None = None

    def advance_to(self, index: int, finished: FinishedBlocks | None = None) -> None:
        """Send the activations through the decoder blocks before `index`. No block may be open: this opens them.

        Args:
            index: the decoder block that they enter afterwards.
            finished: the quantized layers to put into those blocks; None: the blocks keep their own weights.
        """
        self._embedded()  # first: making the activations opens a block, too
        batch_size = self.memory.batch_size
        while self.position < index:
            with self.source.open_block(self.position) as block:
                if finished is not None:
                    # The batch size changes the order of the sums inside the block's kernels, so only the one that the
                    # interrupted run used here gives back the same bits.
                    self.memory.batch_size = finished.manifests[self.position].memory["batch_size"]
                    replace_weights(block, finished.layers(self.position, str(self.source.device)))
                self.advance()
        self.memory.batch_size = batch_size  # what the run was left with, which `finished` blocks have overwritten

    def advance(self) -> None:
        """Send the activations through the current decoder block, which must be open, with the weights it has now.

        Raises:
            InputError: the outputs are not finite, or memory ran out for good.
        """
        activations, index = self._embedded(), self.position
        with self.phases.of("propagate"):
            smaller = self.memory.smaller_batches(activations.batch_size)
            self.memory.retry(f"after block {index}", lambda: activations.advance(index), smaller, activations.to_host)
        self.position += 1  # only after all batches have left the block: an error leaves the position as it was

    def input_groups(self) -> list[InputGroup]:
        """The input groups of the current decoder block, in the order in which the block uses them."""
        activations = self._embedded()
        return self._retry_calibration(lambda: input_groups(activations, self.position))

    def passes_in_sequence(self, groups: list[InputGroup]) -> list[list[InputGroup]]:
        """The groups of the current decoder block in as many passes as true-sequential needs."""
        return passes_in_sequence(self._embedded(), self.position, groups)

    def statistics(self, groups: list[InputGroup]) -> MeasuredGroups:
        """The input statistics of those of some groups of the current decoder block that any calibration token reaches.

        They are from one pass over all sequences.
        """
        activations = self._embedded()
        measure = partial(input_statistics, activations, self.position, groups, self.length_one)
        return self._retry_calibration(measure)

    def to_host(self) -> str | None:
        """Move the activations to host memory: a remedy for `Memory.retry`; None: there are none on the GPU."""
        return None if self._made is None else self._made.to_host()

    def _embedded(self) -> BlockActivations:
        if self._made is None:
            with self.phases.of("calibrate"):
                self._made = BlockActivations(self.source, *self._tokens, self.memory)
        return self._made

    def _retry_calibration(self, run: Callable[[], Any]) -> Any:
        """Remedies from the cheapest: smaller batches cost speed, host memory copies, Hessians in parts more products."""
        activations = self._embedded()
        smaller = self.memory.smaller_batches(activations.batch_size)
        remedies = (smaller, activations.to_host, self.memory.smaller_hessian_parts)
        with self.phases.of("calibrate"):
            return self.memory.retry(f"in the calibration of block {self.position}", run, *remedies)

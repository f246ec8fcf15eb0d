"""The activations of the calibration sequences, taken through the model one decoder block after the other."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource, linear_layers, replace_weights
from runners.models.memory import Memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import (
    Hook,
    InputGroup,
    MeasuredGroups,
    hooked,
    input_groups,
    passes_in_sequence,
)
from runners.quantization.measuring import Originals, input_statistics
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
        in_step: activations that are moved to host memory with these.

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
        in_step: "CalibrationActivations | None" = None,
    ) -> None:
        self.source = source
        self.length_one = length_one
        self.memory = memory or Memory()
        self.phases = phases or Phases(source.device)
        self.position = 0
        self._tokens = sequences, batch_size, held_out
        self._in_step = in_step
        self._made: BlockActivations | None = None

    def advance_to(self, index: int, finished: FinishedBlocks | None = None, quantized: bool = True) -> None:
        """Send the activations through the decoder blocks before `index`. No block may be open: this opens them.

        Args:
            index: the decoder block that they enter afterwards.
            finished: the blocks that are finished, to be walked through as the run that made them did; None: there are none.
            quantized: put the quantized layers of `finished` into them; otherwise the blocks keep their own weights.
        """
        self._embedded()  # first: making the activations opens a block, too
        batch_size = self.memory.batch_size
        while self.position < index:
            with self.source.open_block(self.position) as block:
                if finished is not None:
                    # The batch size changes the order of the sums inside the block's kernels, so only the one that the
                    # interrupted run used here gives back the same bits.
                    self.memory.batch_size = finished.manifests[self.position].memory["batch_size"]
                    if quantized:
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

    def statistics(self, groups: list[InputGroup], originals: Originals | None = None) -> MeasuredGroups:
        """The input statistics of those of some groups of the current decoder block that any calibration token reaches.

        They are from one pass over all sequences.

        Args:
            originals: see `measuring.input_statistics`; called anew where memory has run out.
        """
        activations = self._embedded()
        measure = partial(input_statistics, activations, self.position, groups, self.length_one, originals)
        return self._retry_calibration(measure)

    def layer_inputs(self, batch: int, names: list[str]) -> dict[str, Tensor]:
        """The inputs (tokens, in) of some layers of the current decoder block, for one batch of sequences."""
        activations = self._embedded()
        layers = linear_layers(activations.blocks[self.position])
        seen: dict[str, list[Tensor]] = {name: [] for name in names}

        def note(name: str) -> Hook:
            return lambda _module, args: seen[name].append(args[0].flatten(0, -2))

        with hooked([(layers[name].module, note(name)) for name in names]):
            activations.run_batch(self.position, batch)
        # A copy, which the block cannot write to; it comes in parts where memory is short.
        return {name: torch.cat(parts) for name, parts in seen.items() if parts}

    def to_host(self) -> str | None:
        """Move the activations to host memory: a remedy for `Memory.retry`; None: there are none on the GPU."""
        made = [those._made for those in (self, self._in_step) if those is not None and those._made is not None]
        return next(filter(None, [activations.to_host() for activations in made]), None)

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

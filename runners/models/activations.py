"""The activations of all sequences at the input of a decoder block, and the means to send them through it.

For every block that is `BlockSource.open_block`, the outputs equal those of the model's own forward pass: the block is run
with the arguments that the model itself passes to it (`runners.models.bypass`). `runners.models.walk_check` holds a model to
that. What blocks hand to later ones in a container, such as shared keys and values, travels with each batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from runners.errors import InputError
from runners.models.blocks import BlockSource
from runners.models.bypass import (
    BlockArguments,
    arguments_depend_on_the_text,
    bypassed,
    entering,
    learn_tuple_lengths,
    record_arguments,
    run_model,
)
from runners.models.containers import contents, copied, is_container, joined, of_rows, unchanged, with_tensors
from runners.models.memory import Memory

Shared = dict[str, Any]  # what blocks have handed to later ones, by the name of the argument

GPU_SHARE = (
    0.4  # of the GPU's free memory that activations may take: a block, its Hessians and its solver need the rest
)


class BlockActivations:
    """The activations that enter one decoder block, for all sequences; at first the embedded tokens, which enter block 0.

    Args:
        source: a causal language model.
        sequences: token ids (sequences, length).
        batch_size: sequences that are held together, and go through a block together unless memory is short.
        held_out: token ids (sequences, length) that go through the blocks, too, in batches of their own after the others.
        memory: how much is held at once; by default all that `batch_size` allows.

    Attributes:
        hidden: one tensor (batch, length, width) per batch.
        calibration_batches: how many batches hold `sequences`; those after them are held out.
        calibration_tokens, held_out_tokens: how many tokens `sequences` have, and how many are held out.
        batch_index: of the batch that `run` has sent last.
        on_batch: called by `advance` with the number of batches that have left the block.
        shared: per batch, what the blocks before have handed to later ones.
    """

    def __init__(
        self,
        source: BlockSource,
        sequences: Tensor,
        batch_size: int,
        held_out: Tensor | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.source = source
        self.blocks = source.blocks
        self.memory = memory or Memory()
        self.batch_size = batch_size
        self.batch_index = 0
        self._sample = sequences[:batch_size]  # where any tokens of this shape will do
        self._arguments: dict[int, list[BlockArguments]] = {}  # by batch size: masks and alibi have a batch dimension
        self._advanced = 0  # batches that have left the block already, when `advance` is called again after an error
        self.on_batch: Callable[[int], None] = lambda _: None
        self._finite = torch.ones((), dtype=torch.bool, device=source.device)
        learn_tuple_lengths(source, sequences)  # first: every other bypassed pass needs to know them
        self._depend_on_the_text = arguments_depend_on_the_text(source, sequences)
        self._ids = list(sequences.split(batch_size))
        self.calibration_batches = len(self._ids)
        self._ids += [] if held_out is None else list(held_out.split(batch_size))
        self.calibration_tokens = sequences.numel()
        self.held_out_tokens = 0 if held_out is None else held_out.numel()
        self.shared: list[Shared] = [{} for _ in self._ids]
        self._handed: Shared = {}  # what the last batch has handed on, to be kept if it advances
        self.hidden: list[Tensor] = []
        for batch in self._ids:
            hidden, _ = entering(source, 0, batch)
            if self.memory.offload is None:  # decided once, by the first batch: later there is less free memory
                self.memory.offload = would_crowd_gpu(hidden, sequences.numel())
            self.hidden.append(copy_to_host(hidden) if self.memory.offload else hidden)

    def run(self, index: int, first: int = 0) -> Iterator[Tensor]:
        """Send every batch, from batch `first` on, through decoder block `index`, which must be open.

        Yields:
            What leaves the block, (batch, length, width), on the model's device.
        """
        batches = self.hidden[first:]
        on_device = copied_ahead(batches, self.source.device) if self.memory.offload else batches
        for self.batch_index, batch in enumerate(on_device, start=first):
            yield self.forward(index, batch)

    def forward(self, index: int, batch: Tensor) -> Tensor:
        """Send one batch (sequences, length, width) through decoder block `index`, in parts where memory is short."""
        outputs: list[Tensor] = []
        handed: list[Shared] = []
        for part in batch.split(self.memory.batch_size or len(batch)):
            outputs.append(self._run_block(index, part, sum(map(len, outputs))))
            handed.append(self._handed)
        rows = list(map(len, outputs))
        self._handed = {name: joined([part[name] for part in handed], rows) for name in handed[0]}
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def run_batch(self, index: int, number: int) -> Tensor:
        """Send batch `number` alone through decoder block `index`; returns what leaves the block, as `run` does."""
        self.batch_index = number
        return self.forward(index, self.hidden[number].to(self.source.device))

    def sample(self, index: int) -> None:
        """Send as many sequences through decoder block `index` as go through it at once, for what hooks see of it."""
        self.batch_index = 0
        few = self.hidden[0][: self.memory.batch_size]
        self._run_block(index, few.to(self.source.device), 0)

    def advance(self, index: int) -> None:
        """Replace the inputs of decoder block `index` by its outputs, batch by batch.

        Batches that are done stay done when memory runs out on a later one: called again, it continues with that.

        Raises:
            InputError: the outputs are not finite, so nothing that follows would mean anything.
        """
        for output in self.run(index, self._advanced):
            self._finite &= torch.isfinite(output).all()  # read only at the end: reading it here would stall the GPU
            if self.memory.offload:
                self.hidden[self._advanced].copy_(output, non_blocking=True)
            else:
                self.hidden[self._advanced] = output
            self._keep_handed()
            self._advanced += 1
            self.on_batch(self._advanced)
        self._advanced = 0
        if not self._finite:
            raise InputError(
                f"the activations that leave block {index} are not finite: try model.dtype=bfloat16 or float32"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (batch, length, vocabulary) of activations (batch, length, width) that leave the last block."""
        last = len(self.blocks) - 1
        final = hidden.to(self.source.device)

        def visit(index: int, passing: Tensor, _arguments: BlockArguments) -> Tensor:
            return final if index == last else passing

        # The model applies its own last norm and head; the sample's tokens only give its pass the right shape.
        with bypassed(self.source, visit):
            return run_model(self.source, self._sample[: len(hidden)]).logits

    def to_host(self) -> str | None:
        """Move the activations to host memory: a remedy for `Memory.retry`; None: they are not on a GPU."""
        if not any(hidden.is_cuda for hidden in self.hidden):
            return None
        self.memory.offload = True
        for place, hidden in enumerate(self.hidden):
            self.hidden[place] = copy_to_host(hidden)  # one at a time: each frees its GPU memory before the next
            self.shared[place] = with_tensors(self.shared[place], copy_to_host)
        return "activations in host memory"

    def arguments(self, index: int, ids: Tensor) -> BlockArguments:
        """What decoder block `index` receives besides the activations of these sequences (sequences, length)."""
        if self._depend_on_the_text:  # made anew each time: kept, they could take more memory than the activations
            return entering(self.source, index, ids)[1]
        if len(ids) not in self._arguments:
            self._arguments[len(ids)] = record_arguments(self.source, self._sample[: len(ids)])
        return self._arguments[len(ids)][index]

    def _run_block(self, index: int, part: Tensor, first: int) -> Tensor:
        """Send a part of the batch `batch_index` through a block, from its sequence `first` on."""
        ids = self._ids[self.batch_index]
        arguments = self.arguments(index, ids[first : first + len(part)])
        containers = self._containers(arguments, first, len(part))
        before = {name: contents(container) for name, container in containers.items()}
        arguments = arguments.replaced(containers)
        output = self.blocks[index](part, *arguments.args, **arguments.kwargs)
        known = self.shared[self.batch_index]
        self._handed = {
            name: container
            for name, container in containers.items()
            if name in known or not unchanged(before[name], contents(container))
        }
        return output[0] if isinstance(output, tuple | list) else output

    def _containers(self, arguments: BlockArguments, first: int, count: int) -> Shared:
        """The containers among a block's arguments, with what earlier blocks have put into those of these sequences.

        They are copies: a block may be run on a batch several times before the batch advances.
        """
        shared, rows = self.shared[self.batch_index], len(self._ids[self.batch_index])
        return {
            name: with_tensors(of_rows(shared[name], first, count, rows), self._on_device)
            if name in shared
            else copied(value)
            for name, value in arguments.named().items()
            if is_container(value)
        }

    def _keep_handed(self) -> None:
        """Let what the batch that has just left a block has handed on travel with it."""
        handed = with_tensors(self._handed, copy_to_host) if self.memory.offload else self._handed
        # A block that is given no container leaves what is in it to the blocks that are.
        self.shared[self._advanced] = self.shared[self._advanced] | handed

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.source.device)


def would_crowd_gpu(hidden: Tensor, tokens: int) -> bool:
    """Whether the activations of all sequences would take more than their share of the GPU's free memory.

    Args:
        hidden: the activations of one batch (sequences, length, width).
        tokens: of all sequences together.
    """
    if not hidden.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(hidden.device)
    return tokens * hidden.shape[-1] * hidden.element_size() > GPU_SHARE * free


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; in pinned memory for a tensor of the GPU, as only that is copied beside other work."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


def copied_ahead(batches: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of host memory on `device`, each copied while the one before it is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(batch: Tensor) -> Tensor:
        copies.wait_stream(work)  # the pass before may still be writing its outputs to this batch
        with torch.cuda.stream(copies):
            return batch.to(device, non_blocking=True)

    coming = fetch(batches[0])
    for place in range(len(batches)):
        work.wait_stream(copies)  # before the next copy is queued, which this batch's work need not wait for
        batch = coming
        if place + 1 < len(batches):
            coming = fetch(batches[place + 1])
        batch.record_stream(work)  # made on the other stream: its memory may not be reused before the work has read it
        yield batch

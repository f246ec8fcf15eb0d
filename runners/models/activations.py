"""The activations of all sequences on their way through a decoder, block by block.

What a block receives besides the hidden state (masks, position embeddings, alibi) is recorded from the model's own forward
pass. For that pass, and to apply what follows the last block, the blocks are bypassed: they hand on what they are given, so
that none of their weights need be there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runners.errors import InputError
from runners.models.blocks import BlockSource
from runners.models.memory import Memory

ACTIVATIONS_SHARE = 0.4  # of the GPU's free memory; the blocks' own needs the rest
PROBE = 16  # tokens of the two short sequences that show whether a block's arguments depend on the text


@dataclass
class Call:
    """What a block receives besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a forward pass at a block."""


class BlockActivations:
    """The activations that enter the current block, for all sequences, and the means to send them through it.

    Args:
        source: a causal language model.
        sequences: token ids (sequences, length).
        batch_size: sequences that are held, and go through a block, together.
        held_out: token ids (sequences, length) that come along, but not into the statistics of the others.
        memory: what is to be held at once; by default as much as `batch_size` says.
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
        self.batch_index = 0  # of the batch that is under way
        self._sample = sequences[:batch_size]
        self._calls: dict[int, list[Call]] = {}  # by batch size: masks and alibi have a batch dimension
        self._advanced, self._finite = 0, torch.ones((), dtype=torch.bool, device=source.device)
        _learn_tuples(source, sequences)
        _refuse_arguments_that_depend_on_the_text(source, sequences)
        self.hidden: list[Tensor] = []  # (batch, length, width) each
        batches = list(sequences.split(batch_size))
        self.calibration_batches = len(batches)  # the batches after that are held out
        for batch in batches + ([] if held_out is None else list(held_out.split(batch_size))):
            hidden = _entering(source, 0, batch)[0]
            if self.memory.offload is None:
                self.memory.offload = _crowds(hidden, sequences.numel())
            self.hidden.append(_to_host(hidden) if self.memory.offload else hidden)

    def run(self, index: int, first: int = 0) -> Iterator[Tensor]:
        """Send every batch, from the one at place `first`, through block `index`; yields what leaves it."""
        batches = self.hidden[first:]
        moved = _ahead(batches, self.source.device) if self.memory.offload else batches
        for self.batch_index, batch in enumerate(moved, start=first):
            yield self.forward(index, batch)

    def forward(self, index: int, batch: Tensor) -> Tensor:
        """Send one batch through block `index`, in parts where memory is short."""
        parts = batch.split(self.memory.batch_size or len(batch))
        outputs = [self._run_block(index, part) for part in parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def sample(self, index: int) -> None:
        """Send as many sequences through block `index` as go through it at once, for what hooks see of it."""
        few = self.hidden[0][: self.memory.batch_size]
        self._run_block(index, few.to(self.source.device))

    def advance(self, index: int) -> None:
        """Replace the inputs of block `index` by its outputs, batch by batch. Called again after an error, it goes on.

        Raises:
            InputError: they are not finite, so nothing that follows would mean anything.
        """
        for output in self.run(index, self._advanced):
            self._finite &= torch.isfinite(output).all()  # asked for at the end, so that no batch waits for it
            if self.memory.offload:
                self.hidden[self._advanced].copy_(output, non_blocking=True)
            else:
                self.hidden[self._advanced] = output
            self._advanced += 1
        self._advanced = 0
        if not self._finite:
            raise InputError(
                f"the activations that leave block {index} are not finite: try model.dtype=bfloat16 or float32"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (batch, length, vocabulary) of activations (batch, length, width) that leave the last block."""
        last = len(self.blocks) - 1
        answer = hidden.to(self.source.device)

        def visit(index: int, passing: Tensor, _call: Call) -> Tensor:
            return answer if index == last else passing

        with _bypassed(self.source, visit):
            return _run(self.source, self._sample[: len(hidden)]).logits

    def to_host(self) -> str | None:
        """Move the activations to host memory: a remedy where the GPU's runs out."""
        if self.memory.offload or self.source.device.type != "cuda":
            return None
        self.memory.offload = True
        for place, hidden in enumerate(self.hidden):
            self.hidden[place] = _to_host(hidden)
        return "activations in host memory"

    def _run_block(self, index: int, part: Tensor) -> Tensor:
        if len(part) not in self._calls:
            self._calls[len(part)] = _record(self.source, self._sample[: len(part)])
        call = self._calls[len(part)][index]
        output = self.blocks[index](part, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output


def _run(source: BlockSource, ids: Tensor) -> Any:
    return source.model(ids.to(source.device), use_cache=False)


@contextmanager
def _bypassed(source: BlockSource, visit: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
    """The model with blocks that compute nothing: what leaves block `index` is `visit(index, hidden state, the rest)`."""

    def replacement(index: int, block: nn.Module) -> Callable[..., Any]:
        width = source.tuple_lengths.get(type(block), 0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
            call = Call(args, {key: value for key, value in kwargs.items() if key != "hidden_states"})
            output = visit(index, hidden, call)
            return (output, *[None] * (width - 1)) if width else output

        return forward

    own = [block.__dict__.get("forward") for block in source.blocks]  # of a block that somebody else has changed
    for index, block in enumerate(source.blocks):
        block.forward = replacement(index, block)  # hides the class's
    try:
        yield
    finally:
        for block, forward in zip(source.blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _record(source: BlockSource, ids: Tensor) -> list[Call]:
    """What each block receives besides the hidden state, for a batch of this shape."""
    calls: list[Call] = []

    def visit(_index: int, hidden: Tensor, call: Call) -> Tensor:
        calls.append(call)
        return hidden

    with _bypassed(source, visit):
        _run(source, ids)
    return calls


def _entering(source: BlockSource, index: int, ids: Tensor) -> tuple[Tensor, Call]:
    """What enters block `index` if those before it hand on what they are given: for the first, the embedded tokens."""
    entering: list[tuple[Tensor, Call]] = []

    def visit(place: int, hidden: Tensor, call: Call) -> Tensor:
        if place == index:
            entering.append((hidden, call))
            raise _Stop
        return hidden

    with _bypassed(source, visit), suppress(_Stop):
        _run(source, ids)
    return entering[0]


def _learn_tuples(source: BlockSource, sequences: Tensor) -> None:
    """Find out which classes of blocks return tuples, of what length, by running the first block of each class."""
    ids = sequences.flatten()[None, :PROBE]
    for index, block in enumerate(source.blocks):
        if type(block) not in source.tuple_lengths:
            hidden, call = _entering(source, index, ids)
            with source.open_block(index):
                output = block(hidden, *call.args, **call.kwargs)
            source.tuple_lengths[type(block)] = len(output) if isinstance(output, tuple) else 0


def _refuse_arguments_that_depend_on_the_text(source: BlockSource, sequences: Tensor) -> None:
    """What was recorded from one batch is passed on for all; refuse a model in which that would be wrong."""
    length = min(PROBE, sequences.numel() // 2)
    sample = sequences.flatten()[: 2 * length].reshape(2, length)
    first, second = (_record(source, row[None]) for row in sample)
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if not _same(list(a.args), list(b.args)) or not _same(a.kwargs, b.kwargs):
            raise InputError(
                f"block {index} of {type(source.model).__name__} receives arguments that depend on the text: "
                "this architecture is not supported"
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return True  # flags, caches that are None, modules


def _crowds(hidden: Tensor, tokens: int) -> bool:
    """Whether the activations of so many tokens would take more than their share of the GPU's free memory."""
    if not hidden.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(hidden.device)
    return tokens * hidden.shape[-1] * hidden.element_size() > ACTIVATIONS_SHARE * free


def _to_host(hidden: Tensor) -> Tensor:
    host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
    return host.copy_(hidden)


def _ahead(batches: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of host memory on `device`, each copied while the one before it is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(batch: Tensor) -> Tensor:
        copies.wait_stream(work)  # which may still be writing to it from the pass before
        with torch.cuda.stream(copies):
            return batch.to(device, non_blocking=True)

    coming = fetch(batches[0])
    for place in range(len(batches)):
        work.wait_stream(copies)
        batch = coming
        if place + 1 < len(batches):
            coming = fetch(batches[place + 1])
        batch.record_stream(work)
        yield batch

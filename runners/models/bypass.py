"""A model's own forward pass without the work of its decoder blocks.

What a decoder block receives besides the hidden state (masks, position embeddings, alibi) is made by code that every family
of models has in another form. So it is not computed here but recorded: the model runs with its blocks bypassed, that is,
every block hands on the hidden state that it is given. No weight of a block need be in memory for that.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runners.models.blocks import BlockSource

PROBE_TOKENS = 16  # of the short sequences that show how blocks behave: enough for a mask to have a pattern


@dataclass
class BlockArguments:
    """What a decoder block receives besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def named(self) -> dict[str, Any]:
        """All of them by name; those without one by their place, counted from 1 for the hidden state."""
        return {f"{place}": value for place, value in enumerate(self.args, start=2)} | self.kwargs

    def replaced(self, others: dict[str, Any]) -> "BlockArguments":
        """The same with others in the place of some, by the names of `named`."""
        args = (others.get(f"{place}", value) for place, value in enumerate(self.args, start=2))
        return BlockArguments(tuple(args), {name: others.get(name, value) for name, value in self.kwargs.items()})


Visit = Callable[[int, Tensor, BlockArguments], Tensor]  # block index, hidden state, the rest -> what leaves the block


class _Stop(Exception):
    """Ends a forward pass early, at a block."""


def run_model(source: BlockSource, ids: Tensor) -> Any:
    """The model's own forward pass on token ids (sequences, length)."""
    return source.model(ids.to(source.device), use_cache=False)  # no cache: every sequence is read once, as a whole


@contextmanager
def bypassed(source: BlockSource, visit: Visit) -> Iterator[None]:
    """For the time of the context, decoder block `index` computes nothing and gives `visit(index, hidden, arguments)`."""
    # Somebody may have given a block a `forward` of its own, which must be there again afterwards.
    own_forwards = [block.__dict__.get("forward") for block in source.blocks]
    for index, block in enumerate(source.blocks):
        block.forward = _stand_in(index, source.tuple_lengths.get(type(block), 0), visit)  # hides the class's method
    try:
        yield
    finally:
        for block, forward in zip(source.blocks, own_forwards, strict=True):
            del block.forward  # the class's method shows again
            if forward is not None:
                block.forward = forward


def _stand_in(index: int, tuple_length: int, visit: Visit) -> Callable[..., Any]:
    """A `forward` for block `index` that returns what its model expects: a tensor, or a tuple that begins with it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = visit(index, *split_arguments(args, kwargs))
        return (output, *[None] * (tuple_length - 1)) if tuple_length else output

    return forward


def split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockArguments]:
    """What a decoder block is called with, as the hidden state and the rest."""
    # All of transformers' decoders pass the hidden state first, or by this name.
    hidden, args = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
    return hidden, BlockArguments(args, {name: value for name, value in kwargs.items() if name != "hidden_states"})


def record_arguments(source: BlockSource, ids: Tensor) -> list[BlockArguments]:
    """What each decoder block receives besides the hidden state, for token ids of this shape (sequences, length)."""
    recorded: list[BlockArguments] = []

    def visit(_index: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        recorded.append(arguments)
        return hidden

    with bypassed(source, visit):
        run_model(source, ids)
    return recorded


def entering(source: BlockSource, index: int, ids: Tensor) -> tuple[Tensor, BlockArguments]:
    """What enters decoder block `index` when those before it are bypassed: for block 0, the embedded tokens.

    Args:
        source: the model.
        index: of the block.
        ids: token ids (sequences, length).

    Returns:
        The hidden state (sequences, length, width), and the block's other arguments.
    """
    found: list[tuple[Tensor, BlockArguments]] = []

    def visit(visited: int, hidden: Tensor, arguments: BlockArguments) -> Tensor:
        if visited == index:
            found.append((hidden, arguments))
            raise _Stop  # the rest of the pass, with the head over the whole vocabulary, would be for nothing
        return hidden

    with bypassed(source, visit), suppress(_Stop):
        run_model(source, ids)
    return found[0]


def learn_tuple_lengths(source: BlockSource, sequences: Tensor) -> None:
    """Find out which classes of decoder blocks return tuples, of what length, by running one block of each class.

    Args:
        source: the model; its `tuple_lengths` is filled in.
        sequences: token ids (sequences, length), of which a few are used.
    """
    ids = sequences.flatten()[None, :PROBE_TOKENS]
    for index, block in enumerate(source.blocks):
        if type(block) not in source.tuple_lengths:
            # The blocks before this one are of classes that are known by now, so that the pass gets as far as this one.
            hidden, arguments = entering(source, index, ids)
            with source.open_block(index):
                output = block(hidden, *arguments.args, **arguments.kwargs)
            source.tuple_lengths[type(block)] = len(output) if isinstance(output, tuple | list) else 0


def arguments_depend_on_the_text(source: BlockSource, sequences: Tensor) -> bool:
    """Whether blocks receive other arguments for another text, such as embeddings of the tokens for each block.

    Args:
        source: the model.
        sequences: token ids (sequences, length); two short pieces of them are compared.
    """
    length = min(PROBE_TOKENS, sequences.numel() // 2)
    pieces = sequences.flatten()[: 2 * length].reshape(2, length)
    first, second = (record_arguments(source, piece[None]) for piece in pieces)
    return not all(same(a.args, b.args) and same(a.kwargs, b.kwargs) for a, b in zip(first, second, strict=True))


def same(a: Any, b: Any) -> bool:
    """Whether two arguments of a block hold equal tensors, in containers as well."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return True  # flags, caches that are None, modules: none of them holds anything of the text

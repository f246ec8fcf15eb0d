"""Containers among the arguments of decoder blocks, through which one block hands something to later ones.

Blocks that share keys and values, for one, write them to a dictionary from which later blocks read. Such a container belongs
to the sequences that go through the blocks: it is divided, joined and moved like their activations.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runners.errors import InputError

DEPTH = 6  # of containers within containers that are looked at; a cache of key/value pairs has four


def contents(value: Any, depth: int = DEPTH) -> Any:
    """What a value holds at this moment, to be compared later by `unchanged`.

    Lists, dictionaries, and objects with attributes are looked into; a tensor is kept with the count of its changes in
    place, and without a copy.
    """
    if isinstance(value, Tensor):
        return value, value._version
    if depth == 0 or value is None or isinstance(value, nn.Module | type | str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: contents(entry, depth - 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [contents(entry, depth - 1) for entry in value]
    return {name: contents(entry, depth - 1) for name, entry in getattr(value, "__dict__", {}).items()}


def written_to(before: Any) -> bool:
    """Whether a tensor of these `contents` has been changed in place since."""
    if isinstance(before, dict):
        return any(map(written_to, before.values()))
    if isinstance(before, tuple) and len(before) == 2 and isinstance(before[0], Tensor):
        return before[0]._version != before[1]
    return isinstance(before, list) and any(map(written_to, before))


def is_container(value: Any) -> bool:
    """Whether a block could write to this argument, and the walk could give each batch its own."""
    return isinstance(value, Mapping | list)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a container, and of those in it, with each tensor replaced by what `change` makes of it."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)  # keeps the class, which may have methods that blocks call
        for key, entry in value.items():
            copied[key] = with_tensors(entry, change)
        return copied
    if type(value) in (list, tuple):
        return type(value)(with_tensors(entry, change) for entry in value)
    return value


def copied(container: Any) -> Any:
    """A copy that a block may write to, with the same tensors."""
    return with_tensors(container, lambda tensor: tensor)


def of_rows(container: Any, first: int, count: int, rows: int) -> Any:
    """The part of a container of `rows` sequences that belongs to `count` of them, from `first` on.

    Raises:
        InputError: a tensor in it has another first dimension, so that nobody can tell which part belongs to whom.
    """

    def change(tensor: Tensor) -> Tensor:
        _check_rows(tensor, rows)
        return tensor[first : first + count]

    return copied(container) if count == rows else with_tensors(container, change)


def joined(containers: list[Any], rows: list[int]) -> Any:
    """The container of all sequences, of those of its parts, which hold `rows` sequences each; undoes `of_rows`.

    Raises:
        InputError: as for `of_rows`.
    """
    if len(containers) == 1:
        return containers[0]
    parts: list[list[Tensor]] = [[] for _ in containers]
    for tensors, container, count in zip(parts, containers, rows, strict=True):
        with_tensors(container, lambda tensor, tensors=tensors: tensors.append(tensor) or tensor)
        for tensor in tensors:
            _check_rows(tensor, count)
    whole = iter([torch.cat(pieces) for pieces in zip(*parts, strict=True)])
    return with_tensors(containers[0], lambda _: next(whole))


def _check_rows(tensor: Tensor, rows: int) -> None:
    if not tensor.ndim or len(tensor) != rows:
        raise InputError(
            f"decoder blocks hand a tensor {tuple(tensor.shape)} to later ones for {rows} sequences: only where the first "
            "dimension is that of the sequences can a batch be divided. This architecture is not supported"
        )


def unchanged(before: Any, now: Any) -> bool:
    """Whether two `contents` are the same tensors, none of them changed in place, in the same containers."""
    if isinstance(before, dict):
        return isinstance(now, dict) and before.keys() == now.keys() and all(unchanged(before[k], now[k]) for k in now)
    if isinstance(before, list | tuple):
        return isinstance(now, list | tuple) and len(before) == len(now) and all(map(unchanged, before, now))
    if isinstance(before, Tensor):  # not ==, which would compare every entry
        return before is now
    return before is now or (type(before) is type(now) and before == now)

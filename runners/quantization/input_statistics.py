"""The statistics of the inputs of a decoder block's linear layers, measured while the calibration sequences run through it.

Layers that receive the same input tensor (an *input group*: query, key and value, say) share its statistics. Which layers do
is seen when the block runs; no family of models is known by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantease.matmul import add_second_moment
from runners.models.activations import BlockActivations
from runners.models.blocks import linear_layers
from runners.storage.cache import Cache

PARTS = ("hessian", "mean_input", "held_out")  # fields of InputStatistics, as the cache names its tensors

InputGroup = tuple[str, ...]  # names of the layers of a decoder block that share an input
MeasuredGroups = list[tuple[InputGroup, "InputStatistics"]]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class InputStatistics:
    """Means over all calibration tokens of functions of a layer's input x, float32.

    Attributes:
        hessian: of x x^T (in, in). The Hessian of the mean squared output error, but for a factor of 2.
        mean_input: of |x| (in,).
        held_out: of x x^T (in, in) over the held-out tokens; None: there are none.
    """

    hessian: Tensor
    mean_input: Tensor
    held_out: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether every entry of the Hessian is a finite number."""
        # The extremes are NaN where any entry is: one pass, and no mask as large as the Hessian.
        return all(map(torch.isfinite, self.hessian.aminmax()))


def input_groups(activations: BlockActivations, index: int) -> list[InputGroup]:
    """The linear layers of an open decoder block by the input that they share, in the order in which the block uses them.

    Args:
        activations: at the inputs of the block. A few sequences are sent through it.
        index: of the block.

    Returns:
        The groups. A layer that the block does not use for these sequences is in none.
    """
    layers = linear_layers(activations.blocks[index])
    # One input is one tensor, told by where it is in memory. The tensors are kept, so that none takes another's memory.
    seen: dict[tuple[Any, ...], tuple[Tensor, list[str]]] = {}

    def note(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            seen.setdefault((x.data_ptr(), x.shape, x.stride()), (x, []))[1].append(name)

        return hook

    with _hooked([(layer.module, note(name)) for name, layer in layers.items()]):
        activations.sample(index)
    return [tuple(names) for _, names in seen.values()]


def input_statistics(activations: BlockActivations, index: int, groups: list[InputGroup]) -> list[InputStatistics]:
    """Run an open decoder block on all sequences and take the statistics of some groups' inputs.

    Args:
        activations: at the inputs of the block.
        index: of the block.
        groups: from `input_groups`.

    Returns:
        One entry per group, in the order of `groups`.
    """
    layers = linear_layers(activations.blocks[index])
    calibration, held_out = _Sums(), _Sums()

    def sums() -> _Sums:
        return calibration if activations.batch_index < activations.calibration_batches else held_out

    def add(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums().add(name, args[0].flatten(0, -2), activations.memory.hessian_parts)

        return hook

    with _hooked([(layers[group[0]].module, add(group[0])) for group in groups]):  # the others' input is the same
        for output in activations.run(index):
            # Counted once per batch and not by the hooks, which run once per part where memory is short.
            sums().tokens += output.shape[0] * output.shape[1]
    return [
        InputStatistics(*calibration.means(group[0]), held_out.means(group[0])[0] if held_out.tokens else None)
        for group in groups
    ]


class StatisticsCache:
    """The input statistics of one model's decoder blocks on one set of sequences, kept for all runs that share them.

    Args:
        cache: where they are kept.
        key: all that they depend on, but for the block.
        device: where they are needed.
    """

    def __init__(self, cache: Cache, key: dict[str, Any], device: torch.device) -> None:
        self._cache, self._key, self._device = cache, key, str(device)

    def get(self, index: int) -> MeasuredGroups | None:
        """The statistics of all input groups of decoder block `index`, in the block's order; None: they are not kept."""
        tensors = self._cache.get(self._key_of(index), self._device)
        if tensors is None:
            return None
        by_group: dict[str, dict[str, Tensor]] = {}
        for name, tensor in sorted(tensors.items()):  # by the number that a name begins with
            numbered_group, _, part = name.rpartition("/")
            by_group.setdefault(numbered_group, {})[part] = tensor
        return [
            (tuple(numbered_group.partition("/")[2].split(",")), InputStatistics(**parts))
            for numbered_group, parts in by_group.items()
        ]

    def put(self, index: int, measured: MeasuredGroups) -> None:
        """Keep the statistics of all input groups of decoder block `index`, as tensors `NUMBER/LAYER,LAYER/PART`."""
        tensors = {
            f"{number:03d}/{','.join(group)}/{part}": tensor
            for number, (group, statistics) in enumerate(measured)
            for part in PARTS
            if (tensor := getattr(statistics, part)) is not None
        }
        self._cache.put(self._key_of(index), tensors)

    def _key_of(self, index: int) -> dict[str, Any]:
        return self._key | {"kind": "input statistics", "block": index}


class _Sums:
    """Sums over the tokens of one kind of sequences, calibration or held out; one sum of each kind per layer."""

    def __init__(self) -> None:
        self.tokens = 0
        self._hessians: dict[str, Tensor] = {}
        self._magnitudes: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, parts: int) -> None:
        """Add the tokens' inputs x (tokens, in); sums are float32 whatever the model's dtype."""
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._magnitudes[name] = torch.zeros(x.shape[1], device=x.device)
        # Summed over all tokens and divided once: a running mean would round at every batch.
        add_second_moment(self._hessians[name], x, parts)
        self._magnitudes[name] += x.abs().sum(0, dtype=torch.float32)

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        """The means of x x^T and of |x|. In place, as a second Hessian may not fit: to be asked for once."""
        return self._hessians[name].div_(self.tokens), self._magnitudes[name].div_(self.tokens)


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Modules with a hook that sees their inputs, for the time of the context."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

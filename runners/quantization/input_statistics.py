"""The statistics of the inputs of a decoder block's linear layers, measured while the calibration sequences run through it.

Layers that receive the same input tensor (an *input group*: query, key and value, say) share its statistics. Which layers do
is seen when the block runs; no family of models is known by name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from runners.models.activations import BlockActivations
from runners.models.blocks import LinearLayer, linear_layers
from runners.quantization.token_energy import TokenEnergy
from runners.storage.cache import Cache

PARTS = ("hessian", "mean_input", "held_out", "held_out_tokens")  # of InputStatistics, as the cache names its tensors
ENERGY, TOKENS = "energy", "tokens"  # likewise, of its token energy and of the number of tokens

InputGroup = tuple[str, ...]  # names of the layers of a decoder block that share an input
MeasuredGroups = list[tuple[InputGroup, "InputStatistics"]]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class InputStatistics:
    """Means of functions of a layer's input x over the calibration tokens that reach the layer, float32.

    All tokens reach most layers; an expert is reached by those that are routed to it.

    With `calibration.token_weights=length_one`, x / ||x|| takes the place of x in `hessian` and `mean_input`, not in the
    others: errors on held-out tokens mean the same whatever a run was calibrated with.

    Attributes:
        hessian: of x x^T (in, in). The Hessian of the mean squared output error, but for a factor of 2.
        mean_input: of |x| (in,).
        held_out: of x x^T (in, in) over the held-out tokens; None: there are none.
        held_out_tokens: inputs x (tokens, in) of some held-out tokens, in the model's dtype; None: there are none.
        cross, cross_half: (in, in), see `quantease.layer.LayerProblem`; None but in `PairedInputs`.
        energy: how the energy ||x||^2 is divided among the calibration tokens.
        tokens: how many calibration tokens have reached the layer; None: unknown.
        of_tokens: how many there are.
    """

    hessian: Tensor
    mean_input: Tensor
    held_out: Tensor | None = None
    held_out_tokens: Tensor | None = None
    energy: TokenEnergy = field(default_factory=TokenEnergy)
    tokens: int | None = None
    of_tokens: int | None = None
    cross: Tensor | None = None
    cross_half: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that is shared between runs, by the names of PARTS, ENERGY and TOKENS; cross moments are not."""
        parts = {name: getattr(self, name) for name in PARTS}
        parts[TOKENS] = None if self.tokens is None else torch.tensor([self.tokens, self.of_tokens])
        return {name: tensor for name, tensor in parts.items() if tensor is not None} | {ENERGY: self.energy.tensor}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "InputStatistics":
        """The inverse of `tensors`."""
        parts: dict[str, Any] = dict(tensors)
        parts[ENERGY] = TokenEnergy.from_tensor(tensors[ENERGY])
        tokens, of_tokens = parts.pop(TOKENS).tolist() if TOKENS in parts else (None, None)
        return cls(**parts, tokens=tokens, of_tokens=of_tokens)

    @property
    def finite(self) -> bool:
        """Whether every entry of the Hessian, and of the cross moment, is a finite number."""
        # The extremes are NaN where any entry is: one pass, and no mask as large as the Hessian.
        moments = (self.hessian,) if self.cross is None else (self.hessian, self.cross)
        return all(torch.isfinite(extreme) for moment in moments for extreme in moment.aminmax())


def input_groups(activations: BlockActivations, index: int) -> list[InputGroup]:
    """The linear layers of an open decoder block by the input that they share, in the order in which the block uses them.

    Args:
        activations: at the inputs of the block. A few sequences are sent through it.
        index: of the block.

    Returns:
        The groups. Those of experts stand together, in the order of the experts, whichever these few sequences reach. Other
        layers that they do not reach are the last, each in a group of its own.
    """
    layers = linear_layers(activations.blocks[index])
    # One input is one tensor, told by where it is in memory. The tensors are kept, so that none takes another's memory.
    seen: dict[tuple[Any, ...], tuple[Tensor, list[str]]] = {}

    def note(name: str) -> Hook:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            seen.setdefault((x.data_ptr(), x.shape, x.stride()), (x, []))[1].append(name)

        return hook

    with hooked([(layer.module, note(name)) for name, layer in layers.items()]):
        activations.sample(index)
    used = [tuple(names) for _, names in seen.values()]
    # Other sequences may reach the rest, such as experts that no token of these is routed to.
    unused: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if not any(name in names for names in used):
            unused.setdefault(id(layer.module), []).append(name)
    return _side_by_side(layers, used + [tuple(names) for names in unused.values()])


def _side_by_side(layers: dict[str, LinearLayer], groups: list[InputGroup]) -> list[InputGroup]:
    """The groups of one stage after each other, where the first of them is; in the order of the block's modules."""
    stages = list(dict.fromkeys(layers[group[0]].stage for group in groups))
    places = {name: place for place, name in enumerate(layers)}
    own = {group: min(places[name] for name in group) if layers[group[0]].of_expert else 0 for group in groups}
    return sorted(groups, key=lambda group: (stages.index(layers[group[0]].stage), own[group]))


def passes_in_sequence(activations: BlockActivations, index: int, groups: list[InputGroup]) -> list[list[InputGroup]]:
    """Divide groups into those that are measured in one pass where each is measured after the groups before it are solved.

    Experts work side by side, each on its own tokens, so none comes before another.
    """
    layers = linear_layers(activations.blocks[index])
    return [list(some) for _, some in groupby(groups, lambda group: layers[group[0]].stage)]


@contextmanager
def hooked(hooks: list[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Modules with a hook that sees their inputs, for the time of the context."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
            (tuple(numbered_group.partition("/")[2].split(",")), InputStatistics.from_tensors(parts))
            for numbered_group, parts in by_group.items()
        ]

    def put(self, index: int, measured: MeasuredGroups) -> None:
        """Keep the statistics of all input groups of decoder block `index`, as tensors `NUMBER/LAYER,LAYER/PART`."""
        tensors = {
            f"{number:06d}/{','.join(group)}/{part}": tensor
            for number, (group, statistics) in enumerate(measured)
            for part, tensor in statistics.tensors.items()
        }
        self._cache.put(self._key_of(index), tensors)

    def _key_of(self, index: int) -> dict[str, Any]:
        return self._key | {"kind": "input statistics", "block": index}

"""The statistics of the inputs of a decoder block's linear layers, measured while the calibration sequences run through it.

Layers that receive the same input tensor (an *input group*: query, key and value, say) share its statistics. Which layers do
is seen when the block runs; no family of models is known by name.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from quantease.matmul import add_second_moment
from runners.models.activations import BlockActivations
from runners.models.blocks import LinearLayer, linear_layers
from runners.quantization.token_energy import TokenEnergy
from runners.storage.cache import Cache

PARTS = ("hessian", "mean_input", "held_out", "held_out_tokens")  # of InputStatistics, as the cache names its tensors
ENERGY, TOKENS = "energy", "tokens"  # likewise, of its token energy and of the number of tokens
MOST_TOKENS = 2048  # held-out tokens whose inputs are kept as they are
TOKENS_AT_ONCE = 8192  # of a batch whose inputs are copied to be scaled: with 20,480 inputs 670 MB

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

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that the statistics hold, by the names of PARTS, ENERGY and TOKENS."""
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
        """Whether every entry of the Hessian is a finite number."""
        # The extremes are NaN where any entry is: one pass, and no mask as large as the Hessian.
        return all(map(torch.isfinite, self.hessian.aminmax()))


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

    with _hooked([(layer.module, note(name)) for name, layer in layers.items()]):
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


def input_statistics(
    activations: BlockActivations, index: int, groups: list[InputGroup], length_one: bool = False
) -> MeasuredGroups:
    """Run an open decoder block on all sequences and take the statistics of some groups' inputs.

    Args:
        activations: at the inputs of the block.
        index: of the block.
        groups: from `input_groups`.
        length_one: scale the input of every calibration token to length one before it enters a sum.

    Returns:
        The groups that some calibration token has reached, in the order of `groups`, each with its statistics.
    """
    layers = linear_layers(activations.blocks[index])
    measuring = _Measuring(activations, length_one)
    with _hooked([(layers[name].module, measuring.hook(name)) for name, *_ in groups]):  # the others' input is the same
        for _ in activations.run(index):
            pass
    return [(group, measuring.statistics(group[0])) for group in groups if measuring.has_reached(group[0])]


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


class _Measuring:
    """What is measured of the inputs of some layers while the sequences run through their block."""

    def __init__(self, activations: BlockActivations, length_one: bool) -> None:
        length = activations.hidden[0].shape[1]
        self._activations = activations
        self._calibration, self._held_out = _Sums(length_one), _Sums()
        self._energies = _Energies(activations.calibration_tokens, length)
        self._tokens = _HeldOutTokens(activations.held_out_tokens, length)

    @property
    def _is_calibration(self) -> bool:
        return self._activations.batch_index < self._activations.calibration_batches

    @property
    def sums(self) -> "_Sums":
        """Those of the sequences that are running."""
        return self._calibration if self._is_calibration else self._held_out

    def hook(self, name: str) -> Hook:
        """Of the layer `name`."""

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if not x.numel():  # some experts are called without a token
                return
            self.sums.add(name, x.flatten(0, -2), self._activations.memory.hessian_parts)
            if self._is_calibration:
                self._energies.add(name, x)
            else:
                self._tokens.add(name, x.flatten(0, -2))

        return hook

    def has_reached(self, name: str) -> bool:
        """Whether any calibration token has reached the layer `name`."""
        return self._calibration.has(name)

    def statistics(self, name: str) -> InputStatistics:
        """Of the input of the layer `name`; to be asked for once."""
        return InputStatistics(
            *self._calibration.means(name),
            held_out=self._held_out.means(name)[0] if self._held_out.has(name) else None,
            held_out_tokens=self._tokens.of(name),
            energy=self._energies.of(name),
            tokens=self._calibration.tokens[name],
            of_tokens=self._activations.calibration_tokens,
        )


class _Sums:
    """Sums over the tokens of one kind of sequences, calibration or held out; one sum of each kind per layer.

    Args:
        length_one: every token's input is scaled to length one first.

    Attributes:
        tokens: how many tokens have reached each layer.
    """

    def __init__(self, length_one: bool = False) -> None:
        self.tokens: dict[str, int] = {}
        self._length_one = length_one
        self._hessians: dict[str, Tensor] = {}
        self._magnitudes: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, parts: int) -> None:
        """Add the tokens' inputs x (tokens, in); sums are float32 whatever the model's dtype."""
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._magnitudes[name] = torch.zeros(x.shape[1], device=x.device)
        self.tokens[name] = self.tokens.get(name, 0) + len(x)
        # Summed over all tokens and divided once: a running mean would round at every batch.
        for some in map(_of_length_one, x.split(TOKENS_AT_ONCE)) if self._length_one else [x]:
            add_second_moment(self._hessians[name], some, parts)
            self._magnitudes[name] += some.abs().sum(0, dtype=torch.float32)

    def has(self, name: str) -> bool:
        """Whether the layer has seen any of these sequences' tokens; an expert may see none."""
        return name in self._hessians

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        """The means of x x^T and of |x|. In place, as a second Hessian may not fit: to be asked for once."""
        tokens = self.tokens[name]
        return self._hessians[name].div_(tokens), self._magnitudes[name].div_(tokens)


def _of_length_one(x: Tensor) -> Tensor:
    """Inputs (tokens, in) scaled to length one, float32: half precision would round them once more. Zeros stay zeros."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)  # first, as the squares of very small and large inputs are no float32
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(lengths > 0, lengths, 1)


class _Energies:
    """The energy ||x||^2 of every calibration token; per layer.

    Args:
        tokens: of all sequences.
        length: of a sequence.
    """

    def __init__(self, tokens: int, length: int) -> None:
        self._tokens, self._length = tokens, length
        self._batches: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Add the inputs of some tokens (..., in)."""
        energies = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square()
        self._batches.setdefault(name, []).append(energies.flatten())

    def of(self, name: str) -> TokenEnergy:
        """How the energy of a layer's input is divided among its tokens.

        A layer that sees all tokens of all sequences sees them in their order, whatever the shape of its input (OPT joins
        the sequences before its MLP). An expert sees some of them, at positions that are not known here.
        """
        batches = self._batches.get(name, [])
        if sum(map(len, batches)) == self._tokens and all(len(batch) % self._length == 0 for batch in batches):
            batches = [batch.reshape(-1, self._length) for batch in batches]
        return TokenEnergy.of(batches) if batches else TokenEnergy()


class _HeldOutTokens:
    """The inputs of every k-th held-out token, at most MOST_TOKENS of them; per layer.

    k has no divisor in common with the length of a sequence, so that every position of a window is as likely as any other:
    with every 16th token of windows of 2,048, one in 128 would be a first token, which is unlike all others.

    Args:
        count: how many held-out tokens there are.
        length: of a sequence.
    """

    def __init__(self, count: int, length: int) -> None:
        self._every = max(1, math.ceil(count / MOST_TOKENS))
        while math.gcd(self._every, length) != 1:
            self._every += 1
        self._seen: dict[str, int] = {}
        self._kept: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor) -> None:
        """Keep some of the inputs x (tokens, in)."""
        seen = self._seen.get(name, 0)
        # clone: a view would keep the whole batch alive
        self._kept.setdefault(name, []).append(x[-seen % self._every :: self._every].clone())
        self._seen[name] = seen + len(x)

    def of(self, name: str) -> Tensor | None:
        """The inputs that were kept, (tokens, in); None: the layer has seen no held-out token."""
        kept = self._kept.get(name)
        return torch.cat(kept) if kept else None


@contextmanager
def _hooked(hooks: list[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Modules with a hook that sees their inputs, for the time of the context."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

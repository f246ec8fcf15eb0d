"""What calibration says of the inputs of a block's linear layers; and how runs that calibrate on the same share it.

Layers that share an input are seen to share it when the block runs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantease.matmul import add_second_moment
from runners.models.activations import BlockActivations
from runners.models.blocks import linear_layers
from runners.storage.cache import Cache

PARTS = ("hessian", "mean_input", "held_out")

MeasuredGroups = list[
    tuple[tuple[str, ...], "InputStatistics"]
]  # the layers that share an input, and what is known of it


def input_groups(walk: BlockActivations, index: int) -> list[tuple[str, ...]]:
    """The linear layers of a block, grouped by the input they share, in the order in which the block uses them.

    A layer that the first sequences do not use is in no group.
    """
    layers = linear_layers(walk.blocks[index])
    seen: dict[tuple[Any, ...], tuple[Tensor, list[str]]] = {}  # holds the tensors, so that none takes another's memory

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            seen.setdefault((x.data_ptr(), x.shape, x.stride()), (x, []))[1].append(name)

        return hook

    handles = [layer.module.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        walk.sample(index)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in seen.values()]


@dataclass(frozen=True)
class InputStatistics:
    """What calibration says of the input x of a layer: means over all tokens, float32."""

    hessian: Tensor  # (in, in), of x x^T
    mean_input: Tensor  # (in,), of |x|
    held_out: Tensor | None = None  # (in, in), of x x^T over the sequences that are held out

    @property
    def finite(self) -> bool:
        # The extremes are NaN where any entry is, and nothing as large as the Hessian is made beside it.
        return all(map(torch.isfinite, self.hessian.aminmax()))


class _Sums:
    """Sums over the tokens of one kind of sequences, calibration or held out."""

    def __init__(self) -> None:
        self.tokens = 0
        self._hessians: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, parts: int) -> None:
        if name not in self._hessians:
            self._hessians[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self._sizes[name] = torch.zeros(x.shape[1], device=x.device)
        add_second_moment(self._hessians[name], x, parts)
        self._sizes[name] += x.abs().sum(0, dtype=torch.float32)

    def means(self, name: str) -> tuple[Tensor, Tensor]:
        return self._hessians[name].div_(self.tokens), self._sizes[name].div_(self.tokens)


def input_statistics(walk: BlockActivations, index: int, groups: list[tuple[str, ...]]) -> list[InputStatistics]:
    """Run block `index` on all batches; for each group of layers the statistics of the input they share."""
    layers = linear_layers(walk.blocks[index])
    used, held_out = _Sums(), _Sums()

    def sums() -> _Sums:
        return used if walk.batch_index < walk.calibration_batches else held_out

    def add(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums().add(name, args[0].flatten(0, -2), walk.memory.hessian_parts)

        return hook

    handles = [layers[group[0]].module.register_forward_pre_hook(add(group[0])) for group in groups]
    try:
        for output in walk.run(index):
            sums().tokens += output.shape[0] * output.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return [
        InputStatistics(*used.means(group[0]), held_out.means(group[0])[0] if held_out.tokens else None)
        for group in groups
    ]


class StatisticsCache:
    """The statistics of one model's blocks on one set of calibration sequences.

    Args:
        key: all that they depend on.
    """

    def __init__(self, cache: Cache, key: dict[str, Any], device: torch.device) -> None:
        self._cache, self._key, self._device = cache, key, str(device)

    def get(self, index: int) -> MeasuredGroups | None:
        """For each group of layers of block `index` what is known of the input that they share; None: nothing."""
        tensors = self._cache.get(self._of(index), self._device)
        if tensors is None:
            return None
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in sorted(tensors.items()):
            group, _, part = name.rpartition("/")
            groups.setdefault(group, {})[part] = tensor
        return [
            (tuple(group.partition("/")[2].split(",")), InputStatistics(**parts)) for group, parts in groups.items()
        ]

    def put(self, index: int, measured: MeasuredGroups) -> None:
        """Keep them."""
        tensors = {
            f"{place:03d}/{','.join(group)}/{part}": tensor
            for place, (group, statistics) in enumerate(measured)
            for part in PARTS
            if (tensor := getattr(statistics, part)) is not None
        }
        self._cache.put(self._of(index), tensors)

    def _of(self, index: int) -> dict[str, Any]:
        return self._key | {"kind": "input statistics", "block": index}

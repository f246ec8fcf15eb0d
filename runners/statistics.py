"""What calibration says of the inputs of each block, kept for all runs that calibrate on the unquantized model."""

from typing import Any

import torch

from runners.blocks import InputStatistics
from runners.cache import Cache

PARTS = ("hessian", "mean_input", "held_out")


class SharedStatistics:
    """The statistics of one model's blocks on one set of calibration sequences.

    Args:
        key: all that they depend on.
    """

    def __init__(self, cache: Cache, key: dict[str, Any], device: torch.device) -> None:
        self._cache, self._key, self._device = cache, key, str(device)

    def get(self, index: int) -> list[tuple[tuple[str, ...], InputStatistics]] | None:
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

    def put(self, index: int, measured: list[tuple[tuple[str, ...], InputStatistics]]) -> None:
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

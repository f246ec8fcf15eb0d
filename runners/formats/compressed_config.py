"""What the config of a compressed-tensors checkpoint says: groups of layers, and the grid of each.

`quantization_config`, or `compression_config` as older versions called it. Whatever would change activations or the cache
of keys and values is refused: a perplexity of the weights alone would not be that of the checkpoint.
"""

import re
from dataclasses import dataclass
from typing import Any

from runners.errors import InputError
from runners.formats.scheme import Scheme

FORMATS = ("pack-quantized", "naive-quantized", "int-quantized")
STRATEGIES = ("tensor", "channel", "group")
BITS = range(2, 9)
CLASSES = ("Linear",)  # targets that name a class of layers and not a layer


@dataclass(frozen=True)
class Group:
    """A config group.

    Attributes:
        targets: names of layers, patterns after `re:`, or the class `Linear`.
        strategy: what shares a scale: `tensor`, `channel` or `group`.
    """

    targets: tuple[str, ...]
    strategy: str
    scheme: Scheme

    def has(self, layer: str) -> bool:
        """Whether a layer is of this group."""
        return any(_fits(target, layer) for target in self.targets)


def read_groups(config: dict[str, Any], where: str) -> tuple[Group, ...]:
    """The groups of a config.

    Args:
        where: file and key of the config, for messages.

    Raises:
        InputError: naming the entry that cannot be measured.
    """
    if config.get("kv_cache_scheme") is not None:
        raise InputError(
            f"kv_cache_scheme in {where} quantizes the cache of keys and values, which is not measured here"
        )
    if (sparsity := config.get("sparsity_config")) and sparsity.get("format") not in (None, "dense"):
        raise InputError(f"sparsity_config in {where} has the format {sparsity.get('format')}, which cannot be read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise InputError(f"config_groups in {where} is empty: it does not say how any layer is quantized")
    return tuple(_group(config, name, group, where) for name, group in groups.items())


def layers_of(names: set[str], parts: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """The layers that are packed, or whose weight has a scale beside it: for each the names of its tensors by part."""
    found: dict[str, dict[str, str]] = {}
    for anchor in ("weight_packed", "weight_scale"):
        ending = f".{anchor}"
        for name in (name for name in names if name.endswith(ending)):
            module = name.removesuffix(ending)
            mine = ("weight_packed", *parts) if f"{module}.weight_packed" in names else ("weight", *parts)
            found[module] = {part: full for part in mine if (full := f"{module}.{part}") in names}
    return found


def _group(config: dict[str, Any], name: str, group: Any, where: str) -> Group:
    place = f"config_groups.{name} in {where}"
    if not isinstance(group, dict) or not isinstance(weights := group.get("weights"), dict):
        raise InputError(f"{place} does not say how weights are quantized")
    for activations in ("input_activations", "output_activations"):
        if group.get(activations) is not None:
            raise InputError(
                f"{place} quantizes activations, too ({activations}): only a checkpoint whose weights alone are quantized "
                "can be measured"
            )
    layout = str(group.get("format") or config.get("format"))
    if layout not in FORMATS:
        raise InputError(f"the format of {place} is {layout}, not one of {', '.join(FORMATS)}")
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if kind != "int" or bits not in BITS:
        raise InputError(f"{place} has weights of the type {kind} with {bits} bits: only int with 2 to 8 can be read")
    size = weights.get("group_size")
    strategy = str(weights.get("strategy") or _strategy(size))
    if strategy not in STRATEGIES or (strategy == "group" and (type(size) is not int or size < 1)):
        raise InputError(f"{place} has the strategy {strategy} with group_size={size}: it cannot be read")
    scheme = Scheme(
        method="compressed-tensors",
        layout=f"compressed-tensors {layout}",
        bits=bits,
        group_size=size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") not in (None, False),
    )
    return Group(tuple(map(str, group.get("targets") or ())), strategy, scheme)


def _strategy(size: Any) -> str:
    """What compressed-tensors takes where a config names no strategy."""
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _fits(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), layer) is not None
        except re.error:
            return False
    return target in CLASSES or layer == target

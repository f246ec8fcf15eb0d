"""The setting `layers`: layers of unlike treatment. Each entry names layers by a pattern, and the grid that they get.

A pattern is compared with `BLOCK.LAYER`, the two columns of layers.csv (`0.self_attn.q_proj`); `*` stands for anything, dots
included. Of several entries whose patterns match a layer the first counts; a layer that none matches gets the run's grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from quantease.grid import GridSpec
from quantease.grids.formats import FORMATS
from runners.errors import InputError
from runners.identity import identity_of
from runners.models.blocks import decoder_blocks, full_name, linear_layers
from runners.results.metrics import INT, bits_words, group_words

SAME = "same"  # group_size where an entry has none: null is a group size of its own
FORMAT_BITS = 4  # of all formats
GROUPS: dict[str, int | None] = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}  # as conf/grid/ has them
SOME_NAMES = 8  # of layers, in a sentence


@dataclass(frozen=True)
class LayerRule:
    """One entry of `layers`: what it does not say is as in the run.

    Attributes:
        match: the pattern.
        group_size: columns that share a scale; None: per-channel; SAME: the run's, or what the entry's own grid has.
        grid: `int`, `nf4`, `mxfp4` or `nvfp4`; None: the run's.
        skip: the layers keep their weights; nothing else may be said of them.
    """

    match: str = ""
    bits: int | None = None
    group_size: int | str | None = SAME
    grid: str | None = None
    symmetric: bool | None = None
    skip: bool = False

    def __post_init__(self) -> None:
        if not self.match:
            raise ValueError('match is missing: it names layers as BLOCK.LAYER, such as "*.fc2" or "0.*"')
        said = [name for name in ("bits", "grid", "symmetric") if getattr(self, name) is not None]
        said += ["group_size"] * (self.group_size != SAME)
        if self.skip and said:
            raise ValueError(f"skip=true keeps the weights of {self.match}, so {said[0]} says nothing: leave one out")
        if not self.skip and not said:
            raise ValueError(
                f"match={self.match} changes nothing: add bits, group_size, grid, symmetric or skip: true to the entry"
            )
        if self.grid not in (None, INT, *FORMATS):
            raise ValueError(f"grid must be one of {', '.join((INT, *FORMATS))}, not {self.grid}")
        if isinstance(self.group_size, str) and self.group_size != SAME:
            raise ValueError(f"group_size must be a number of columns or null, not {self.group_size!r}")

    def spec(self, run: GridSpec) -> GridSpec | None:
        """The grid of the layers that match, from the run's grid; None: they are skipped.

        Raises:
            ValueError: what the entry says is out of range, or contradicts its grid.
        """
        if self.skip:
            return None
        base = run if self.grid is None else _on_grid(run, self.grid)
        changes: dict[str, Any] = {"bits": self.bits, "symmetric": self.symmetric}
        changes = {name: value for name, value in changes.items() if value is not None}
        return replace(base, **changes, **({} if self.group_size == SAME else {"group_size": self.group_size}))

    def identity(self, run: GridSpec) -> dict[str, Any]:
        """What can change a number: the whole grid, however much of it the entry says itself."""
        spec = self.spec(run)
        if spec is None:
            return {"match": self.match, "skip": True}
        grid = identity_of(replace(spec, format=None)) | {"format": spec.format and spec.format.name}
        return {"match": self.match, "grid": grid}

    def words(self, run: GridSpec) -> str:
        """`*.fc2 4 bits group 64`, `0.* skipped`."""
        spec = self.spec(run)
        return f"{self.match} {'skipped' if spec is None else spec_words(spec)}"


def spec_words(spec: GridSpec) -> str:
    """`nf4 4 bits group 64`, `3 bits per-channel symmetric`."""
    kind = [] if spec.format is None else [spec.format.name]
    return " ".join([*kind, bits_words(spec.bits), group_words(spec.group_size), *["symmetric"] * spec.symmetric])


def _on_grid(run: GridSpec, name: str) -> GridSpec:
    """The run's grid, but on levels or on whole codes."""
    kind = FORMATS.get(name)
    if kind == run.format:
        return run
    if kind is None:
        return replace(run, format=None)
    scale_bits = run.scale_bits if name == "nf4" else 16  # the others have formats of their own
    return GridSpec(FORMAT_BITS, GROUPS[name], scale_bits=scale_bits, format=kind)


def first_match(rules: Sequence[LayerRule], layer: str) -> int | None:
    """The place of the entry that counts for a layer, given by its full name; None: no pattern matches it."""
    return next((place for place, rule in enumerate(rules) if fnmatchcase(layer, rule.match)), None)


def spec_of(rules: Sequence[LayerRule], run: GridSpec, layer: str) -> GridSpec | None:
    """The grid of a layer, given by its full name; None: it is skipped."""
    place = first_match(rules, layer)
    return run if place is None else rules[place].spec(run)


def check_rules(model: Any, rules: Sequence[LayerRule], run: GridSpec) -> None:
    """Refuse entries without which every layer would get what it gets with them, and a run that skips all layers.

    Args:
        model: its weights may be on the meta device.
        run: the grid of layers that no pattern matches.

    Raises:
        InputError: naming the entry, and why it changes nothing.
    """
    if not rules:
        return
    layers = [
        full_name(index, name) for index, block in enumerate(decoder_blocks(model)) for name in linear_layers(block)
    ]
    for place, rule in enumerate(rules):
        _check_rule(place, rule, rules, run, layers)
    if all(spec_of(rules, run, layer) is None for layer in layers):
        raise InputError(f"layers skips all {len(layers)} layers, so nothing would be quantized: take method=fp16")


def _check_rule(place: int, rule: LayerRule, rules: Sequence[LayerRule], run: GridSpec, layers: list[str]) -> None:
    who = f"layers[{place}], match={rule.match},"
    matched = [layer for layer in layers if fnmatchcase(layer, rule.match)]
    if not matched:
        raise InputError(
            f"{who} matches no layer: patterns are compared with BLOCK.LAYER, as layers.csv has them: {_some(layers)}"
        )
    mine = [layer for layer in matched if first_match(rules, layer) == place]
    if not mine:
        raise InputError(f"{who} changes nothing: the first match wins, and entries before it match all of its layers")
    others = [*rules[:place], *rules[place + 1 :]]
    if all(spec_of(rules, run, layer) == spec_of(others, run, layer) for layer in mine):
        raise InputError(
            f"{who} changes nothing: without it {mine[0]}{' and the others' * (len(mine) > 1)} would be treated the same"
        )


def _some(layers: list[str]) -> str:
    """The first layers, which are those of a block, and the last."""
    shown = layers if len(layers) <= SOME_NAMES else [*layers[: SOME_NAMES - 1], "...", layers[-1]]
    return ", ".join(shown)

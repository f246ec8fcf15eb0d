"""Which series a figure of layer errors shows, and relative to which.

One figure per number of bits and grid, of the grids that say most. Errors of layers differ by factors of a hundred within
a model, and those of methods by tens of percent, so a figure shows their ratio: the error of every layer over that which
GPTQ leaves in the same layer, at the same bits and grid, of the same calibration.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.collect import read_config
from analysis.figures.points import quantized, seed_words
from analysis.series import Row
from runners.results.metrics import BITS_PER_WEIGHT, OWN_GRID, bits_words, group_words

BASES = ("gptq", "rtn")  # the first of these methods that was run is the one that errors are divided by
LONGEST_GRID = 80  # characters, in the name of a file
MOST_GRIDS = 2  # figures per number of bits
MOST_SERIES = 6  # in a panel; more could not be told apart
FIRST = ("rtn", "quantease", "quantease_best")  # among series of equal bits: the yardsticks of all others


@dataclass(frozen=True)
class LayerChoice:
    """What one figure shows.

    Attributes:
        model: its name.
        bits: of all its series.
        grid: of all its series, in words.
        base: the method whose errors the others are divided by; None where none of `BASES` was run, or nothing but one of
            them: errors as they are.
        shown: the series in the order of tables, each with the one that it is divided by (None without a base).
        hidden: series that are not shown.
    """

    model: str
    bits: float
    grid: str
    base: str | None
    shown: list[tuple[Row, Row | None]]
    hidden: list[Row]

    @property
    def title(self) -> str:
        """Model, bits and grid, and what errors are relative to."""
        what = [self.model, bits_words(self.bits), self.grid.replace(OWN_GRID, "a grid of its own")]
        return f"{', '.join(what)}: error of every layer{self._relative}"

    @property
    def _relative(self) -> str:
        if self.base == BASES[0]:
            return " relative to GPTQ's"
        if self.base:
            return f" relative to {self.base}'s (GPTQ was not run)"
        alone = any(row["method"] in BASES for row, _ in self.shown)
        return "" if alone else f" ({' and '.join(BASES)} were not run)"

    @property
    def caption(self) -> str:
        """The title, over how many seeds errors are averaged, and which series are not shown."""
        words = f"{self.title}; {seed_words([row for row, _ in self.shown])}"
        if self.hidden:
            nearest = "nearest to it in bits per weight" if self.base else "of the fewest bits per weight"
            names = ", ".join(row["label"] for row in self.hidden)
            words += f". Shown are the {len(self.shown)} series {nearest}, not {names}"
        return words

    @property
    def file(self) -> str:
        """The name of the figure's file."""
        grid = re.sub(r"[^\w.-]+", "-", self.grid)  # of mixed layers it has patterns, and no end
        grid = grid if len(grid) <= LONGEST_GRID else f"{grid[:LONGEST_GRID]}-{sha256(grid.encode()).hexdigest()[:8]}"
        return f"layers-{self.model}-{bits_words(self.bits)}-{grid}.png".replace(" ", "-")


def layer_choices(summary: list[Row], layers: pd.DataFrame, model: str) -> list[LayerChoice]:
    """The figures of a model's layer errors: bits downwards, and of each number the `MOST_GRIDS` grids that say most.

    These are grids without act-order, other ranges or other token weights before those with, then by the number of series.

    Args:
        summary: the series, from `analysis.series.summarize`.
        layers: layers.csv of all runs, from `analysis.collect.read_tables`.
        model: the model whose layers are shown.
    """
    # Runs without calibration have measured no error, and zeros stand for it.
    known = set(layers.loc[layers["relative_error"] > 0, "series"]) if len(layers) else set()
    rows = [row for row in quantized(summary) if row["model"] == model and row["series"] in known]
    figures = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        members = [row for row in rows if row["bits"] == bits]
        figures += [_choice(model, bits, grid, members) for grid in _grids(members)]
    return [figure for figure in figures if figure.shown]


def _grids(rows: list[Row]) -> list[str]:
    counts = Counter(row["grid"] for row in rows)
    plain = {row["grid"] for row in rows if row["grid"] == group_words(row["group_size"])}
    return sorted(counts, key=lambda grid: (grid not in plain, -counts[grid]))[:MOST_GRIDS]


def _choice(model: str, bits: float, grid: str, rows: list[Row]) -> LayerChoice:
    """The base, and the series that are nearest to it in what they store: more bits would explain a lower error."""
    members = [row for row in rows if row["grid"] == grid]
    base = next((method for method in BASES if any(row["method"] == method for row in members)), None)
    if all(row["method"] == base for row in members):
        base = None  # there is nothing to compare with it
    bases = [row for row in members if row["method"] == base]
    pairs = [(row, _base_of(row, bases)) for row in members]
    drawn = [(row, other) for row, other in pairs if row is not other and (other is not None or base is None)]
    anchor = min((row[BITS_PER_WEIGHT] for row in bases), default=0.0)

    def place(row: Row) -> tuple[float, bool, Any]:
        return abs(row[BITS_PER_WEIGHT] - anchor), row["method"] not in FIRST, row["rank"]

    near = sorted(drawn, key=lambda pair: place(pair[0]))[:MOST_SERIES]
    shown = [pair for pair in drawn if any(pair[0] is row for row, _ in near)]
    visible = [row["series"] for pair in shown for row in pair if row]
    hidden = [row for row in members if row["series"] not in visible]
    return LayerChoice(model, bits, grid, base, shown, hidden)


def _base_of(row: Row, bases: list[Row]) -> Row | None:
    """The first series of the base that was calibrated as the row was."""
    return next((base for base in bases if base is row or _calibrated_alike(row, base)), None)


def _calibrated_alike(one: Row, other: Row) -> bool:
    """Whether two series have equal settings of calibration, of those that both know: older runs lack some."""
    first, second = (read_config(Path(row["folders"][0])).get("calibration") or {} for row in (one, other))
    return all(first[name] == second[name] for name in first.keys() & second.keys())


def errors_of(choice: LayerChoice, layers: pd.DataFrame) -> tuple[str, dict[str, Any]]:
    """The column of layers.csv that the figure shows, and of each series its values by kind of layer and block.

    Held-out errors where every series has them: those of the calibration data flatter whoever fits them longest. They are
    means over the seeds that a series and its base share; of several layers of a kind in a block (experts), over these.
    """
    series = {row["series"] for pair in choice.shown for row in pair if row}
    known = layers.loc[layers["series"].isin(sorted(series))]
    held_out = "held_out_error" in known and known.groupby("series")["held_out_error"].any().all()
    column = "held_out_error" if held_out else "relative_error"
    kinds = kind_names(list(dict.fromkeys(known["layer"])))
    by = ["series", "kind", "block", "seed"]
    every: Any = known.assign(kind=known["layer"].map(kinds)).groupby(by, sort=False)[column].mean()
    return column, {row["series"]: _relative(every, row, base) for row, base in choice.shown}


def _relative(every: Any, row: Row, base: Row | None) -> Any:
    own = every.loc[row["series"]]
    levels = ["kind", "block"]
    if base is None:
        return own.groupby(level=levels, sort=False).mean()
    pair: Any = pd.concat([own, every.loc[base["series"]]], axis=1, join="inner", keys=["own", "base"])
    means = pair.groupby(level=levels, sort=False).mean()
    return (means["own"] / means["base"]).where(lambda ratio: ratio.map(math.isfinite))


def kind_names(layers: list[str]) -> dict[str, str]:
    """The kind of each layer: the last part of its name, all of it where two kinds share that; experts are one kind.

    `self_attn.q_proj` is `q_proj`; `attn.c_proj` and `mlp.c_proj` keep their names; `experts.7.up` is `experts.*.up`.
    """
    whole = {name: ".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in layers}
    last = Counter(kind.rpartition(".")[2] for kind in dict.fromkeys(whole.values()))
    return {name: short if last[short := kind.rpartition(".")[2]] == 1 else kind for name, kind in whole.items()}

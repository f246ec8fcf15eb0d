"""What the figures of whole models share: which series have a number, and how a series is drawn."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.figures.style import Look, fill, fill_words, legend_key
from analysis.series import Row, all_keys
from runners.results.metrics import PER_CHANNEL, REFERENCE, names, ppl


class LeftOut(Exception):
    """The reason, in a sentence, why a study has no such figure."""


def having(rows: list[Row], metric: str) -> list[Row]:
    """The rows with a number for the metric."""
    values = ((row, row.get(metric)) for row in rows)
    return [row for row, value in values if isinstance(value, int | float) and not math.isnan(value)]


def texts_of(rows: list[Row]) -> list[str]:
    """The texts on which some row has a perplexity."""
    return [text for text in names(all_keys(rows), "ppl") if having(rows, ppl(text))]


def quantized(rows: list[Row]) -> list[Row]:
    """The rows without full precision."""
    return [row for row in rows if row["method"] != REFERENCE]


def seed_words(rows: list[Row]) -> str:
    """Over how many seeds the numbers of rows are averaged: `one seed`, `mean over 3 seeds`, `mean over 1 to 3 seeds`."""
    counts = {row["seeds"] for row in quantized(rows)} or {1}
    if counts == {1}:
        return "one seed"
    least, most = min(counts), max(counts)
    return f"mean over {most} seeds" if least == most else f"mean over {least} to {most} seeds"


def draw_series(axis: Axes, rows: list[Row], x: str, y: str, look: Look, line: str) -> None:
    """Points with error bars: a task's standard error where there is one, else the standard deviation over seeds."""
    _draw(axis, rows, [(row[x], row[y]) for row in rows], y, look, line)


def draw_point(axis: Axes, row: Row, place: tuple[float, float], y: str, look: Look) -> None:
    """One series at a place that may differ from its own, with the error bar of its metric `y`."""
    _draw(axis, [row], [place], y, look, "none")


def _draw(axis: Axes, rows: list[Row], places: list[tuple[float, float]], y: str, look: Look, line: str) -> None:
    color, marker = look[rows[0]["label"]]
    errors = [row.get(f"{y}_stderr", row["deviations"].get(y, math.nan)) for row in rows]
    axis.errorbar(
        [place[0] for place in places],
        [place[1] for place in places],
        yerr=None if all(map(math.isnan, errors)) else errors,
        color=color,
        marker=marker,
        linestyle=line,
        linewidth=1.2,
        elinewidth=1,
        capsize=2,
        label=rows[0]["label"],
        markeredgewidth=0.8,
        **fill(rows[0]["grid"]),
    )


def fill_keys(rows: list[Row]) -> list[Line2D]:
    """Entries of the legend for what the fill of a marker says of the grid, where there are several fills."""
    named: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["rank"]):
        named.setdefault(fill_words(row["grid"]), fill(row["grid"]))
    if list(named) in ([], [PER_CHANNEL]):
        return []
    return [legend_key(words, marker="o", linestyle="none", **style) for words, style in named.items()]

"""What the figures of whole models share: which series have a number, and how a series is drawn."""

import math

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.figures.style import HOLLOW, Look, is_hollow, legend_key
from analysis.series import Row, all_keys
from runners.results.metrics import PER_CHANNEL, REFERENCE, names, ppl

MOST_NAMED = 3  # grids in one entry of a legend; more would be wider than the figure
OTHERS = "groups, act-order, other tokens"


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


def draw_series(axis: Axes, rows: list[Row], x: str, y: str, look: Look, line: str) -> None:
    """Points with error bars: a task's standard error where there is one, else the standard deviation over seeds."""
    color, marker = look[rows[0]["label"]]
    errors = [row.get(f"{y}_stderr", row["deviations"].get(y, math.nan)) for row in rows]
    axis.errorbar(
        [row[x] for row in rows],
        [row[y] for row in rows],
        yerr=None if all(map(math.isnan, errors)) else errors,
        color=color,
        marker=marker,
        markerfacecolor=HOLLOW if is_hollow(rows[0]["grid"]) else color,
        linestyle=line,
        linewidth=1.2,
        elinewidth=1,
        capsize=2,
        label=rows[0]["label"],
    )


def fill_keys(rows: list[Row]) -> list[Line2D]:
    """Entries of the legend for filled and hollow markers, where there are hollow ones."""
    grids = list(dict.fromkeys(row["grid"] for row in rows if is_hollow(row["grid"])))
    if not grids:
        return []
    filled = legend_key(PER_CHANNEL, marker="o", linestyle="none")
    hollow = " or ".join(grids) if len(grids) <= MOST_NAMED else OTHERS
    return [filled, legend_key(hollow, marker="o", markerfacecolor=HOLLOW, linestyle="none")]

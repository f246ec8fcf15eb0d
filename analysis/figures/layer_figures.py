"""Figures of layer errors, by layer and by sweep of coordinate descent.

One row of panels per number of bits, one column per grid, of those grids that have the most series.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.points import LeftOut
from analysis.figures.style import Look, legend, legend_key, log_axis, looks, panels, styled
from analysis.series import Row
from runners.results.metrics import OWN_GRID, REFERENCE, bits_words

ERROR = "‖(W − Ŵ)X‖² / ‖WX‖²"  # the relative error of a layer, as in the paper of QuantEase (arXiv 2309.01885)
MOST_GRIDS = 4  # columns of panels: more could not be read
MOST_TICKS = 16  # numbers of decoder blocks below a panel, so that they do not overlap


@styled
def layer_errors(summary: list[Row], layers: pd.DataFrame, model: str) -> Figure:
    """Relative error of every linear layer, in the order of the model: on the calibration data, and on held-out data.

    Args:
        summary: the series, from `analysis.series.summarize`.
        layers: layers.csv of all runs, from `analysis.collect.read_tables`.
        model: the model whose layers are shown.
    """
    rows = [row for row in summary if row["model"] == model and row["method"] != REFERENCE]
    if layers.empty or not rows:
        raise LeftOut(f"no quantized run of {model} has a layers.csv.")
    held_out = "held_out_error" in layers and bool(layers["held_out_error"].notna().sum())
    columns = ["relative_error", "held_out_error"] if held_out else ["relative_error"]
    measured = layers.groupby("series").filter(lambda part: (part["relative_error"] > 0).any())  # not: uncalibrated
    means = {str(name): _mean_over_seeds(part, columns) for name, part in measured.groupby("series")}
    rows = [row for row in rows if row["series"] in means]
    if not rows:
        raise LeftOut(f"no run of {model} has measured layer errors.")

    def draw(axis: Axes, row: Row, look: Look) -> None:
        mean = means[row["series"]]
        color, marker = look[row["label"]]
        places = range(len(mean))
        axis.plot(places, list(mean["relative_error"]), color=color, marker=marker, markersize=3, linewidth=1)
        if held_out:
            axis.plot(places, list(mean["held_out_error"]), color=color, linewidth=1, linestyle=":")
        _tick_decoder_blocks(axis, [int(block) for block in mean["block"]])

    extra = [legend_key("on the calibration data"), legend_key("on held-out data", linestyle=":")] if held_out else []
    xlabel = "block (within it: its linear layers in the order in which they are quantized)"
    return _draw_panels(rows, draw, xlabel, extra)


@styled
def sweep_errors(summary: list[Row], sweeps: pd.DataFrame, model: str) -> Figure:
    """Relative error after each sweep of coordinate descent, the mean over layers and seeds.

    Args:
        summary: the series, from `analysis.series.summarize`.
        sweeps: sweeps.csv of all runs, from `analysis.collect.read_tables`.
        model: the model whose layers are averaged.
    """
    by_series = sweeps.groupby("series") if len(sweeps) else []
    means: dict[str, Any] = {str(name): part.groupby("sweep")["relative_error"].mean() for name, part in by_series}
    rows = [row for row in summary if row["model"] == model and row["series"] in means]
    if not rows:
        raise LeftOut(f"no run of {model} kept its error by sweep: run with method.track_objective=true.")

    def draw(axis: Axes, row: Row, look: Look) -> None:
        mean = means[row["series"]]
        color, marker = look[row["label"]]
        axis.plot(list(mean.index), list(mean), color=color, marker=marker, markersize=3, linewidth=1.2)

    return _draw_panels(rows, draw, "sweep", [])


def _draw_panels(rows: list[Row], draw: Callable[[Axes, Row, Look], None], xlabel: str, extra: list[Line2D]) -> Figure:
    """One panel per number of bits and grid, in which `draw` is called for every series."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    counts = Counter(row["grid"] for row in sorted(rows, key=lambda row: row["rank"]))
    most = {grid for grid, _ in counts.most_common(MOST_GRIDS)}
    grids = [grid for grid in counts if grid in most]
    look = looks(rows)
    figure, axes = panels(len(bits), len(grids), width=3.9, height=2.4)
    for line, number in zip(axes, bits, strict=True):
        for axis, grid in zip(line, grids, strict=True):
            members = [row for row in rows if row["bits"] == number and row["grid"] == grid]
            for row in members:
                draw(axis, row, look)
            named = grid.replace(OWN_GRID, "a grid of its own")
            axis.set_title(f"{rows[0]['model']}, {bits_words(number)}, {named}")
            log_axis(axis, "y")  # errors of layers differ by factors of ten
            if not members:
                axis.set_visible(False)  # but keeps its place, so that rows and columns still mean bits and grids
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(f"relative error, {ERROR}", fontsize=9)
    legend(figure, look, extra)
    return figure


def _mean_over_seeds(layers: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The mean of every layer over the seeds, in the order of the file, which is that of the model."""
    mean: Any = layers.groupby(["block", "layer"], sort=False)[columns].mean()
    return mean.reset_index()


def _tick_decoder_blocks(axis: Axes, blocks: list[int]) -> None:
    """A tick where a decoder block begins; `blocks` is the block of every layer in turn."""
    starts = [place for place, block in enumerate(blocks) if place == 0 or blocks[place - 1] != block]
    starts = starts[:: math.ceil(len(starts) / MOST_TICKS)]
    axis.set_xticks(starts, [str(blocks[place]) for place in starts])

"""The figures of layer errors: by layer, and by sweep of coordinate descent. A row of panels a number of bits, a column
a grid."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.collect import REFERENCE
from analysis.figures.model_figures import LeftOut
from analysis.figures.style import Look, key, legend, log_axis, looks, panels, styled
from analysis.series import OWN_GRID, Row

ERROR = "‖(W − Ŵ)X‖² / ‖WX‖²"
TICKS = 16  # blocks that are numbered below a panel, at most


@styled
def layer_errors(summary: list[Row], layers: pd.DataFrame, model: str) -> Figure:
    """Relative error of every linear layer, in the order of the model: on the calibration data, and held-out data.

    Args:
        summary: the series.
        layers: layers.csv of all runs, from `analysis.collect.rows_of`.
        model: whose layers.
    """
    rows = [row for row in summary if row["model"] == model and row["method"] != REFERENCE]
    if layers.empty or not rows:
        raise LeftOut(f"no quantized run of {model} has a layers.csv.")
    held_out = "held_out_error" in layers and bool(layers["held_out_error"].notna().sum())
    columns = ["relative_error", "held_out_error"] if held_out else ["relative_error"]
    means = {str(name): _by_layer(part, columns) for name, part in layers.groupby("series")}

    def draw(axis: Axes, row: Row, look: Look) -> None:
        mean = means[row["series"]]
        color, marker = look[row["label"]]
        places = range(len(mean))
        axis.plot(places, list(mean["relative_error"]), color=color, marker=marker, markersize=3, linewidth=1)
        if held_out:
            axis.plot(places, list(mean["held_out_error"]), color=color, linewidth=1, linestyle=":")
        _tick_blocks(axis, [int(block) for block in mean["block"]])

    extra = [key("on the calibration data"), key("on held-out data", linestyle=":")] if held_out else []
    xlabel = "block (within it: its linear layers in the order in which they are quantized)"
    kept = [row for row in rows if row["series"] in means]
    return _panels(kept, draw, xlabel, extra)


@styled
def sweep_errors(summary: list[Row], sweeps: pd.DataFrame, model: str) -> Figure:
    """Relative error after each sweep of coordinate descent, the mean over layers and seeds (columns of sweeps.csv)."""
    by_series = sweeps.groupby("series") if len(sweeps) else []
    means: dict[str, Any] = {str(name): part.groupby("sweep")["relative_error"].mean() for name, part in by_series}
    rows = [row for row in summary if row["model"] == model and row["series"] in means]
    if not rows:
        raise LeftOut(f"no run of {model} kept its error by sweep: run with method.track_objective=true.")

    def draw(axis: Axes, row: Row, look: Look) -> None:
        mean = means[row["series"]]
        color, marker = look[row["label"]]
        axis.plot(list(mean.index), list(mean), color=color, marker=marker, markersize=3, linewidth=1.2)

    return _panels(rows, draw, "sweep", [])


def _panels(rows: list[Row], draw: Callable[[Axes, Row, Look], None], xlabel: str, extra: list[Line2D]) -> Figure:
    """A grid of panels, bits by grid, with `draw` called for every series; logarithmic errors."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    grids = list(dict.fromkeys(row["grid"] for row in sorted(rows, key=lambda row: row["rank"])))
    look = looks(rows)
    figure, axes = panels(len(bits), len(grids), width=3.9, height=2.4)
    for line, number in zip(axes, bits, strict=True):
        for axis, grid in zip(line, grids, strict=True):
            members = [row for row in rows if row["bits"] == number and row["grid"] == grid]
            for row in members:
                draw(axis, row, look)
            axis.set_title(f"{rows[0]['model']}, {number} bits, {'a grid of its own' if grid == OWN_GRID else grid}")
            log_axis(axis, "y")
            if not members:
                axis.set_visible(False)
    figure.supxlabel(xlabel, fontsize=9)
    figure.supylabel(f"relative error, {ERROR}", fontsize=9)
    legend(figure, look, extra)
    return figure


def _by_layer(layers: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The mean over seeds of every layer, in the order of the file."""
    mean: Any = layers.groupby(["block", "layer"], sort=False)[columns].mean()
    return mean.reset_index()


def _tick_blocks(axis: Axes, blocks: list[int]) -> None:
    """A tick where a block begins."""
    starts = [place for place, block in enumerate(blocks) if place == 0 or blocks[place - 1] != block]
    starts = starts[:: math.ceil(len(starts) / TICKS)]
    axis.set_xticks(starts, [str(blocks[place]) for place in starts])

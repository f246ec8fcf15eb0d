"""The figure of layer errors: one panel per kind of layer, over the depth of the model.

What it shows, and relative to what, is chosen by `layer_choice`.
"""

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.layer_choice import LayerChoice, errors_of
from analysis.figures.style import METHODS, Marker, legend, legend_key, log_axis, looks, panels, styled

ERROR = "‖(W − Ŵ)X‖² / ‖WX‖²"  # the relative error of a layer, as in the paper of QuantEase (arXiv 2309.01885)
MOST_COLUMNS = 4
DATA = {"held_out_error": "held-out tokens", "relative_error": "calibration tokens"}  # of columns in layers.csv


@styled
def layer_errors(choice: LayerChoice, layers: pd.DataFrame) -> Figure:
    """Errors by decoder block, one panel per kind of layer; below the line at 1 a method leaves less than the base.

    Args:
        choice: what to show, from `analysis.figures.layer_choice.layer_choices`.
        layers: layers.csv of all runs, from `analysis.collect.read_tables`.
    """
    column, values = errors_of(choice, layers)
    kinds = list(dict.fromkeys(kind for series in values.values() for kind in series.index.unique("kind")))
    columns = min(MOST_COLUMNS, math.ceil(len(kinds) / 2))
    figure, axes = panels(math.ceil(len(kinds) / columns), columns, width=2.5, height=2.0, share=True)
    places = [axis for line in axes for axis in line]
    look = looks([row for row, _ in choice.shown])
    for axis, kind in zip(places, kinds, strict=False):
        axis.set_title(kind)
        for row, _ in choice.shown:
            _draw_line(axis, values[row["series"]], kind, *look[row["label"]])
        if choice.base:
            axis.axhline(1, color=METHODS[choice.base][0], linewidth=1.2, zorder=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    log_axis(places[0], "y")  # shared by all; a half and a double are equally far from 1
    for axis in places[len(kinds) :]:
        axis.set_visible(False)
    for axis in places[: len(kinds)][-columns:]:
        axis.tick_params(labelbottom=True)  # also where the place below is empty
    base = [legend_key(f"{choice.base} = 1", color=METHODS[choice.base][0])] if choice.base else []
    legend(figure, look, base)
    figure.suptitle(choice.title, fontsize=10)
    figure.supxlabel("decoder block", fontsize=9)
    ratio = f"error over {choice.base}'s" if choice.base else ERROR
    figure.supylabel(f"{ratio}, on {DATA[column]}", fontsize=9)
    return figure


def _draw_line(axis: Axes, values: Any, kind: str, color: str, marker: Marker) -> None:
    """One series in a panel. What is not above zero has no place on a logarithmic axis."""
    if kind not in values.index.unique("kind"):
        return
    line = values.loc[kind]
    line = line.where(line > 0).sort_index()
    axis.plot(list(line.index), list(line), color=color, marker=marker, markersize=3, linewidth=1)

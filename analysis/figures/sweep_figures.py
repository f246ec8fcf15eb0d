"""Figures of the layer error by sweep of coordinate descent.

One row of panels per number of bits, one column per grid, of those grids that have the most series.
"""

from collections import Counter
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.layer_figures import ERROR
from analysis.figures.points import LeftOut
from analysis.figures.style import legend, log_axis, looks, panels, styled
from analysis.series import Row
from runners.results.metrics import OWN_GRID, bits_words

MOST_GRIDS = 4  # columns of panels: more could not be read


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
                mean = means[row["series"]]
                color, marker = look[row["label"]]
                axis.plot(list(mean.index), list(mean), color=color, marker=marker, markersize=3, linewidth=1.2)
            named = grid.replace(OWN_GRID, "a grid of its own")
            axis.set_title(f"{model}, {bits_words(number)}, {named}")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            log_axis(axis, "y")  # errors fall by factors
            if not members:
                axis.set_visible(False)  # but keeps its place, so that rows and columns still mean bits and grids
    figure.supxlabel("sweep", fontsize=9)
    figure.supylabel(f"relative error, {ERROR}", fontsize=9)
    legend(figure, look, [])
    return figure

"""The figure of one run: layer errors over the depth of the model."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runners.results.layers import LayerRecord


def layer_error_figure(records: Sequence[LayerRecord]) -> Figure:
    """Relative layer error over the block index, one line per layer of a block. Errors of zero are left out, as the axis
    is logarithmic, and those that were not measured."""
    figure = Figure(figsize=(6.4, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(record.layer for record in records):
        points = [(r.block, r.relative_error) for r in records if r.layer == name and r.relative_error]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    if axes.lines:  # Matplotlib warns of a logarithmic axis without a positive value
        axes.set_yscale("log")
        axes.legend(fontsize="small", frameon=False, ncols=2)
    axes.set(xlabel="block", ylabel="relative layer error")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """The figure as 8-bit RGB (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()

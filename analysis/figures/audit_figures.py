"""What each layer costs alone, in one run against another."""

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.audit import compared, single_layers
from analysis.figures.points import LeftOut
from analysis.figures.style import GRAY, METHODS, OTHERS, legend, legend_key, panels, short, styled

NAMED = 3  # layers that are named in a panel: those that cost the other run most more
MOST_PANELS = 4


@styled
def against_base(frame: pd.DataFrame, base: str) -> Figure:
    """KL of every layer alone in the run `base` (x) and in each other run (y); above the diagonal the other loses more.

    Args:
        frame: from `analysis.audit.read_audits`.
        base: the run of the x axis.

    Raises:
        LeftOut: there is no other run, or no layer that two runs have in common.
    """
    others = [name for name in frame["run"].unique() if name != base][:MOST_PANELS]
    pairs = {other: _positive(compared(frame, base, other), base, other) for other in others}
    pairs = {other: pair for other, pair in pairs.items() if len(pair)}
    if not pairs:
        raise LeftOut(f"there is no run to compare with {base}")
    kinds = list(dict.fromkeys(single_layers(frame)["layer"]))
    every = [*OTHERS, *METHODS.values()]
    look = {kind: every[place % len(every)] for place, kind in enumerate(kinds)}
    figure, axes = panels(1, len(pairs), width=3.4, height=3.2)
    for axis, (other, pair) in zip(axes[0], pairs.items(), strict=True):
        x, y = f"kl {base}", f"kl {other}"
        for kind, layers in pair.groupby("layer"):
            color, marker = look[str(kind)]
            axis.plot(list(layers[x]), list(layers[y]), color=color, marker=marker, linestyle="none", markersize=4)
        low, high = pair[[x, y]].min().min(), pair[[x, y]].max().max()
        axis.plot([low, high], [low, high], color=GRAY, linewidth=1, zorder=0)
        for row in pair.loc[pair["difference"] > 0].head(NAMED).to_dict("records"):
            label = f"{row['block']} {str(row['layer']).rpartition('.')[2]} "
            axis.annotate(label, (float(row[x]), float(row[y])), fontsize=7, ha="right", va="bottom")
        axis.set(xlabel=f"KL alone, {base}", ylabel=f"KL alone, {other}", xscale="log", yscale="log")
        for which in (axis.xaxis, axis.yaxis):
            which.set_major_locator(LogLocator(base=10))  # powers of ten alone: layers of one model differ by several
            which.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            which.set_minor_formatter(NullFormatter())
    legend(figure, look, [legend_key("the same", color=GRAY)])
    return figure


def _positive(pair: pd.DataFrame, base: str, other: str) -> pd.DataFrame:
    """Without layers that cost nothing, for which a logarithmic axis has no place."""
    return pair.loc[(pair[f"kl {base}"] > 0) & (pair[f"kl {other}"] > 0)]

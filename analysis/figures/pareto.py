"""Perplexity against bits per weight."""

import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.placement import Place, apart, far_right
from analysis.figures.points import LeftOut, draw_point, fill_keys, having, quantized, seed_words, texts_of
from analysis.figures.style import GRAY, Look, legend, legend_key, log_axis, looks, panels, short, styled
from analysis.series import Row, protocol_of
from runners.results.metrics import BITS_PER_WEIGHT, REFERENCE, ppl

# The closer Pareto panels end at this multiple of the lowest perplexity. Beyond it a model is of little use, and points
# at 2 bits, ten or a hundred times as high, would press all others onto the axis.
CLOSE = 1.5
MARGIN = 0.05  # of an axis, beyond its outermost points
LEAST_PAD = 1.01  # of an axis of perplexity whose points are all at one height
SLOT = 0.1  # of the axis's width, for every number of bits per weight beyond the break


def pareto_file(model: str) -> str:
    """The name of the figure's file."""
    return f"pareto-{model}.png"


def pareto_caption(summary: list[Row], model: str) -> str:
    """What points and bars are: there are bars only where there are several seeds."""
    rows = [row for row in quantized(summary) if row["model"] == model]
    several = any(row["seeds"] > 1 for row in rows)
    bars = "; bars: standard deviation over the seeds" if several else ""
    single = ", none where there is one" if several and any(row["seeds"] == 1 for row in rows) else ""
    moved = "points that would cover each other are moved apart sideways"
    return f"Perplexity against bits per weight, {model} ({seed_words(rows)}{bars}{single}; {moved})"


@styled
def pareto(summary: list[Row], model: str) -> Figure:
    """Perplexity against bits per weight; one column of panels per text, with the part close to the best below.

    Points are means, bars standard deviations over the seeds where there are several; the gray steps are the Pareto front.
    Points that would cover each other are moved apart sideways; those far to the right are beyond a break of the axis.
    """
    rows = [row for row in summary if row["model"] == model]
    shown, texts = quantized(rows), texts_of(rows)
    if not texts or not shown:
        raise LeftOut(f"no quantized run of {model} has a perplexity.")
    look = looks(shown)
    figure, axes = panels(2, len(texts), width=4.6, height=3.6)
    for (whole, close), text in zip(zip(*axes, strict=True), texts, strict=True):
        _draw_whole(whole, rows, ppl(text), look)
        whole.set_title(f"{model}: {text} (protocol {protocol_of(rows, text)})")
        _draw_close(close, rows, ppl(text), look)
    full = next((row["label"] for row in rows if row["method"] == REFERENCE), REFERENCE)
    lines = [legend_key("best at its bits or fewer", color=GRAY), legend_key(full, color="black", linestyle="--")]
    legend(figure, look, [*lines, *fill_keys(shown)], line="none")
    return figure


def front(rows: list[Row], metric: str) -> list[Row]:
    """The Pareto front, by bits per weight: the series than which none is lower at as many bits or fewer."""
    best: list[Row] = []
    for row in sorted(having(rows, metric), key=lambda row: (row[BITS_PER_WEIGHT], row[metric])):
        if not best or row[metric] < best[-1][metric]:
            best.append(row)
    return best


def _draw_whole(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    """All series, on a logarithmic axis of perplexity; those far to the right beyond a break of the other axis."""
    known = having(quantized(rows), metric)
    far = far_right(known)
    near = [row for row in known if row not in far]
    low, high = (end(row[BITS_PER_WEIGHT] for row in near) for end in (min, max))
    width = max(high - low, 0.5)
    edges = low - MARGIN * width, high + MARGIN * width
    values = [row[metric] for row in having(rows, metric)]
    pad = max((max(values) / min(values)) ** MARGIN, LEAST_PAD)
    limits = min(values) / pad, max(values) * pad
    slots = sorted({f"{row[BITS_PER_WEIGHT]:.2f}" for row in far}, key=float)
    right = edges[1] + SLOT * width * len(slots)
    axis.set(xlim=(edges[0], right), ylim=limits)
    log_axis(axis, "y")
    _draw_points(axis, near, metric, look, math.log)
    for row in far:
        x = edges[1] + SLOT * width * (slots.index(f"{row[BITS_PER_WEIGHT]:.2f}") + 0.5)
        draw_point(axis, row, Place(x, row[metric]), metric, look)
    _draw_lines(axis, rows, near, metric)
    if slots:
        _break_axis(axis, edges[1], [edges[1] + SLOT * width * (i + 0.5) for i in range(len(slots))], slots)


def _draw_close(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    """The part of the front that is close to the lowest perplexity, as a rule that of full precision."""
    known = having(quantized(rows), metric)
    floor = min(row[metric] for row in having(rows, metric))
    near = [row[BITS_PER_WEIGHT] for row in front(known, metric) if row[metric] <= CLOSE * floor]
    axis.set_title(f"the same, closer: up to {CLOSE:g} times the lowest")
    axis.set_ylim(0.985 * floor, CLOSE * floor)  # leaves the line of full precision off the axis
    if near:
        # More room on the right: past the front's end other methods take more bits for about the same perplexity.
        axis.set_xlim(min(near) - 0.1, max(near) + 0.4)
        left, right = axis.get_xlim()
        inside = [row for row in known if row[metric] <= 0.99 * CLOSE * floor and left <= row[BITS_PER_WEIGHT] <= right]
        _draw_points(axis, inside, metric, look, float)
    _draw_lines(axis, rows, known, metric)


def _draw_points(axis: Axes, rows: list[Row], metric: str, look: Look, scale: Callable[[float], float]) -> None:
    """One point per series, moved sideways where it would cover another; `scale` is that of the axis of perplexity."""
    places = [Place(row[BITS_PER_WEIGHT], row[metric]) for row in rows]
    for row, place in zip(rows, apart(places, axis.get_xlim(), axis.get_ylim(), scale), strict=True):
        draw_point(axis, row, place, metric, look)


def _draw_lines(axis: Axes, rows: list[Row], near: list[Row], metric: str) -> None:
    """The front among the series that are in the panel's range, and full precision."""
    best = front(near, metric)
    # Steps and not slopes: there is no model between two points of the front.
    steps = [row[BITS_PER_WEIGHT] for row in best], [row[metric] for row in best]
    axis.step(*steps, where="post", color=GRAY, linewidth=1, zorder=0)
    for row in rows:
        if row["method"] == REFERENCE and metric in row:
            axis.axhline(row[metric], color="black", linestyle="--", linewidth=1, zorder=0)
    axis.set(xlabel="bits per weight, everything stored", ylabel="perplexity")


def _break_axis(axis: Axes, edge: float, slots: list[float], names: list[str]) -> None:
    """Beyond `edge` the axis has no scale: a band with one tick per number of bits per weight that occurs there."""
    ticks = [float(tick) for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= edge]
    axis.set_xticks([*ticks, *slots], [*map(short, ticks), *names])
    axis.axvspan(edge, axis.get_xlim()[1], color=GRAY, alpha=0.12, linewidth=0, zorder=0)
    axis.annotate(
        "//",
        (edge, 0),
        xycoords=axis.get_xaxis_transform(),
        ha="center",
        va="center",
        fontsize=10,
        annotation_clip=False,
    )

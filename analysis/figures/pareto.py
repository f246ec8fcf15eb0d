"""Perplexity against bits per weight."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.points import LeftOut, draw_series, fill_keys, having, quantized, texts_of
from analysis.figures.style import GRAY, Look, legend, legend_key, log_axis, looks, panels, styled
from analysis.series import Row, protocol_of
from runners.results.metrics import BITS_PER_WEIGHT, REFERENCE, ppl

# The closer Pareto panels end at this multiple of the lowest perplexity. Beyond it a model is of little use, and points
# at 2 bits, ten or a hundred times as high, would press all others onto the axis.
CLOSE = 1.5


@styled
def pareto(summary: list[Row], model: str) -> Figure:
    """Perplexity against bits per weight; one column of panels per text, with the part close to the best below.

    Points are means, bars standard deviations over the seeds; the gray steps are the Pareto front.
    """
    rows = [row for row in summary if row["model"] == model]
    shown, texts = quantized(rows), texts_of(rows)
    if not texts or not shown:
        raise LeftOut(f"no quantized run of {model} has a perplexity.")
    look = looks(shown)
    figure, axes = panels(2, len(texts), width=4.4, height=3.4)
    for (whole, close), text in zip(zip(*axes, strict=True), texts, strict=True):
        for axis in (whole, close):
            _draw_pareto(axis, rows, ppl(text), look)
        whole.set_title(f"{model}: {text} (protocol {protocol_of(rows, text)})")
        log_axis(whole, "y")
        _limit_to_close(close, rows, ppl(text))
    full = next((row["label"] for row in rows if row["method"] == REFERENCE), REFERENCE)
    lines = [legend_key("best at its bits or fewer", color=GRAY), legend_key(full, color="black", linestyle="--")]
    legend(figure, look, [*lines, *fill_keys(shown)])
    return figure


def front(rows: list[Row], metric: str) -> list[Row]:
    """The Pareto front, by bits per weight: the series than which none is lower at as many bits or fewer."""
    best: list[Row] = []
    for row in sorted(having(rows, metric), key=lambda row: (row[BITS_PER_WEIGHT], row[metric])):
        if not best or row[metric] < best[-1][metric]:
            best.append(row)
    return best


def _draw_pareto(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    for row in having(quantized(rows), metric):
        draw_series(axis, [row], BITS_PER_WEIGHT, metric, look, line="none")
    best = front(quantized(rows), metric)
    # Steps and not slopes: there is no model between two points of the front.
    steps = [row[BITS_PER_WEIGHT] for row in best], [row[metric] for row in best]
    axis.step(*steps, where="post", color=GRAY, linewidth=1, zorder=0)
    for row in rows:
        if row["method"] == REFERENCE and metric in row:
            axis.axhline(row[metric], color="black", linestyle="--", linewidth=1, zorder=0)
    axis.set(xlabel="bits per weight, everything stored", ylabel="perplexity")


def _limit_to_close(axis: Axes, rows: list[Row], metric: str) -> None:
    """Limit a panel to the part of the front that is close to the lowest perplexity, as a rule that of full precision."""
    floor = min(row[metric] for row in having(rows, metric))
    near = [row[BITS_PER_WEIGHT] for row in front(quantized(rows), metric) if row[metric] <= CLOSE * floor]
    axis.set_title(f"the same, closer: up to {CLOSE:g} times the lowest")
    axis.set_ylim(0.985 * floor, CLOSE * floor)  # leaves the line of full precision off the axis
    if near:
        # More room on the right: past the front's end other methods take more bits for about the same perplexity.
        axis.set_xlim(min(near) - 0.2, max(near) + 0.4)

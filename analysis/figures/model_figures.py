"""Figures of whole models: perplexity against bits and size, zero-shot accuracy, and time.

Every function takes the rows that the tables are made of and returns a figure, or raises `LeftOut` with a sentence that
says why the study has no such figure.
"""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import GRAY, HOLLOW, Look, is_hollow, legend, legend_key, log_axis, looks, panels, styled
from analysis.series import Row, all_keys, protocol_of
from runners.results.metrics import (
    BITS_PER_WEIGHT,
    PER_CHANNEL,
    QUANTIZE_SECONDS,
    REFERENCE,
    bits_words,
    names,
    ppl,
    zero_shot_parts,
)

# The closer Pareto panels end at this multiple of the lowest perplexity. Beyond it a model is of little use, and points
# at 2 bits, ten or a hundred times as high, would press all others onto the axis.
CLOSE = 1.5


class LeftOut(Exception):
    """The reason, in a sentence, why a study has no such figure."""


@styled
def pareto(summary: list[Row], model: str) -> Figure:
    """Perplexity against bits per weight; one column of panels per text, with the part close to the best below.

    Points are means, bars standard deviations over the seeds; the gray steps are the Pareto front.
    """
    rows = [row for row in summary if row["model"] == model]
    quantized = _quantized(rows)
    texts = _texts(rows)
    if not texts or not quantized:
        raise LeftOut(f"no quantized run of {model} has a perplexity.")
    look = looks(quantized)
    figure, axes = panels(2, len(texts), width=4.4, height=3.4)
    for (whole, close), text in zip(zip(*axes, strict=True), texts, strict=True):
        for axis in (whole, close):
            _draw_pareto(axis, rows, ppl(text), look)
        whole.set_title(f"{model}: {text} (protocol {protocol_of(rows, text)})")
        log_axis(whole, "y")
        _limit_to_close(close, rows, ppl(text))
    lines = [legend_key("best at its bits or fewer", color=GRAY), legend_key(REFERENCE, color="black", linestyle="--")]
    legend(figure, look, [*lines, *_fill_keys(quantized)])
    return figure


def front(rows: list[Row], metric: str) -> list[Row]:
    """The Pareto front, by bits per weight: the series than which none is lower at as many bits or fewer."""
    best: list[Row] = []
    for row in sorted(having(rows, metric), key=lambda row: (row[BITS_PER_WEIGHT], row[metric])):
        if not best or row[metric] < best[-1][metric]:
            best.append(row)
    return best


def _draw_pareto(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    for row in having(_quantized(rows), metric):
        _draw_series(axis, [row], BITS_PER_WEIGHT, metric, look, line="none")
    best = front(_quantized(rows), metric)
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
    near = [row[BITS_PER_WEIGHT] for row in front(_quantized(rows), metric) if row[metric] <= CLOSE * floor]
    axis.set_title(f"the same, closer: up to {CLOSE:g} times the lowest")
    axis.set_ylim(0.985 * floor, CLOSE * floor)  # leaves the line of full precision off the axis
    if near:
        # More room on the right: past the front's end other methods take more bits for about the same perplexity.
        axis.set_xlim(min(near) - 0.2, max(near) + 0.4)


@styled
def against_size(summary: list[Row]) -> Figure:
    """Perplexity against the number of parameters; one row of panels per text, one column per number of bits."""
    titles = {ppl(text): f"perplexity on {text}" for text in _texts(summary)}
    return _draw_by_size(summary, titles, log=True)


@styled
def zero_shot(summary: list[Row]) -> Figure:
    """Zero-shot accuracy against the number of parameters, with the standard error over the questions of a task."""
    titles: dict[str, str] = {}
    tasks = set()
    # Sorted, `acc` comes before `acc_norm`: a task that has both is shown by the first.
    for key in sorted(key for key in all_keys(summary) if isinstance(key, str) and having(summary, key)):
        task, metric = zero_shot_parts(key) or ("", "")
        if metric.startswith(("acc", "exact_match")) and not metric.endswith("_stderr") and task not in tasks:
            tasks.add(task)
            titles[key] = f"accuracy on {task} ({metric})"
    if not titles:
        raise LeftOut("no run has zero-shot accuracies.")
    return _draw_by_size(summary, titles, log=False)


@styled
def seconds(summary: list[Row]) -> Figure:
    """Seconds to quantize a model against its number of parameters, one panel per device."""
    rows = [row for row in having(_quantized(summary), QUANTIZE_SECONDS) if "device" in row]
    _need_two_sizes(rows)
    devices = sorted({row["device"] for row in rows})
    look = looks(rows)
    figure, axes = panels(1, len(devices), width=4.4, height=3.6)
    for axis, device in zip(axes[0], devices, strict=True):
        _draw_families(axis, [row for row in rows if row["device"] == device], QUANTIZE_SECONDS, look)
        log_axis(axis, "x")
        log_axis(axis, "y")
        axis.set(xlabel="parameters", ylabel="seconds to quantize", title=device)
    legend(figure, look, _fill_keys(rows))
    return figure


def _draw_by_size(summary: list[Row], titles: dict[str, str], log: bool) -> Figure:
    """One row of panels per metric (a key and its title), one column per number of bits; lines join a family's models."""
    _need_two_sizes([row for row in summary if any(metric in row for metric in titles)])
    bits = sorted({row["bits"] for row in _quantized(summary)}, reverse=True)
    look = looks(summary)
    figure, axes = panels(len(titles), max(len(bits), 1))
    for line, (metric, title) in zip(axes, titles.items(), strict=True):
        for axis, number in zip(line, bits or [None], strict=True):
            # The reference, whose bits are None, is in every panel.
            shown = having([row for row in summary if row["bits"] in (number, None)], metric)
            _draw_families(axis, shown, metric, look)
            _name_families(axis, shown, metric)
            log_axis(axis, "x")
            if log:
                log_axis(axis, "y")
            axis.set(xlabel="parameters", ylabel=title, title="" if number is None else bits_words(number))
    legend(figure, look, _fill_keys(summary))
    return figure


def _draw_families(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    """A line through the models of a family for every method, number of bits and grid."""
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in having(rows, metric):
        lines.setdefault((row["label"], row["family"], row["bits"], row["grid"]), []).append(row)
    for line in lines.values():
        dashed = is_hollow(line[0]["grid"]) or line[0]["method"] == REFERENCE
        by_size = sorted(line, key=lambda row: row["parameters"])
        _draw_series(axis, by_size, "parameters", metric, look, "--" if dashed else "-")


def _name_families(axis: Axes, rows: list[Row], metric: str) -> None:
    """Write each family's name above its largest model, where there are several families."""
    families = dict.fromkeys(row["family"] for row in rows)
    for family in families if len(families) > 1 else ():
        members = [row for row in rows if row["family"] == family]
        top = max(members, key=lambda row: (row["parameters"], row[metric]))
        axis.annotate(
            family, (top["parameters"], top[metric]), (0, 11), textcoords="offset points", fontsize=7, ha="center"
        )


def _draw_series(axis: Axes, rows: list[Row], x: str, y: str, look: Look, line: str) -> None:
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


def having(rows: list[Row], metric: str) -> list[Row]:
    """The rows with a number for the metric."""
    values = ((row, row.get(metric)) for row in rows)
    return [row for row, value in values if isinstance(value, int | float) and not math.isnan(value)]


def _texts(rows: list[Row]) -> list[str]:
    return [text for text in names(all_keys(rows), "ppl") if having(rows, ppl(text))]


def _quantized(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["method"] != REFERENCE]


def _fill_keys(rows: list[Row]) -> list[Line2D]:
    """Entries of the legend for filled and hollow markers, where there are hollow ones."""
    grids = list(dict.fromkeys(row["grid"] for row in rows if is_hollow(row["grid"])))
    if not grids:
        return []
    filled = legend_key(PER_CHANNEL, marker="o", linestyle="none")
    return [filled, legend_key(" or ".join(grids), marker="o", markerfacecolor=HOLLOW, linestyle="none")]


def _need_two_sizes(rows: list[Row]) -> None:
    if len({row["parameters"] for row in rows if not math.isnan(row["parameters"])}) < 2:
        raise LeftOut("it needs models of two sizes or more.")

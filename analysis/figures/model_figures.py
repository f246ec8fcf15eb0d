"""The figures of a study, each from the rows that the tables are made of.

Every function gives a figure, or raises `LeftOut` with the sentence that says why the study has none.
"""

import math
from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.collect import REFERENCE
from analysis.figures.style import HOLLOW, Look, is_hollow, key, legend, log_axis, looks, panels, styled
from analysis.series import SD, Row, protocol

NEAR = 1.5  # how many times the lowest perplexity the closer panels show


class LeftOut(Exception):
    """Why a study has no such figure, in a sentence."""


@styled
def pareto(summary: list[Row], model: str) -> Figure:
    """Perplexity against bits per weight, a column a text: mean, standard deviation over seeds, and the front."""
    rows = [row for row in summary if row["model"] == model]
    quantized, metrics = _quantized(rows), measured(rows, "ppl/")
    if not metrics or not quantized:
        raise LeftOut(f"no quantized run of {model} has a perplexity.")
    look = looks(quantized)
    figure, axes = panels(2, len(metrics), width=4.4, height=3.4)
    for place, metric in enumerate(metrics):
        for axis in (axes[0][place], axes[1][place]):
            for row in having(quantized, metric):
                _series(axis, [row], "bits_per_weight", metric, look, line="none")
            best = front(quantized, metric)
            steps = [row["bits_per_weight"] for row in best], [row[metric] for row in best]
            axis.step(*steps, where="post", color="#999999", linewidth=1, zorder=0)
            for row in rows:
                if row["method"] == REFERENCE and metric in row:
                    axis.axhline(row[metric], color="black", linestyle="--", linewidth=1, zorder=0)
            axis.set(xlabel="bits per weight, everything stored", ylabel="perplexity")
        text = metric.removeprefix("ppl/")
        axes[0][place].set_title(f"{model}: {text} (protocol {protocol(rows, text)})")
        log_axis(axes[0][place], "y")
        _closer(axes[1][place], rows, metric)
    lines = [key("best at its bits or fewer", color="#999999"), key(REFERENCE, color="black", linestyle="--")]
    legend(figure, look, [*lines, *_fills(quantized)])
    return figure


def front(rows: list[Row], metric: str) -> list[Row]:
    """The series that no other one with as many bits per weight or fewer reaches, by bits per weight."""
    best: list[Row] = []
    for row in sorted(having(rows, metric), key=lambda row: (row["bits_per_weight"], row[metric])):
        if not best or row[metric] < best[-1][metric]:
            best.append(row)
    return best


def _closer(axis: Axes, rows: list[Row], metric: str) -> None:
    """Show the part that is near the lowest perplexity, which is that of full precision as a rule."""
    floor = min(row[metric] for row in having(rows, metric))
    near = [row["bits_per_weight"] for row in front(_quantized(rows), metric) if row[metric] <= NEAR * floor]
    axis.set_title(f"the same, closer: up to {NEAR:g} times the lowest")
    axis.set_ylim(0.985 * floor, NEAR * floor)
    if near:
        axis.set_xlim(min(near) - 0.2, max(near) + 0.4)


@styled
def against_size(summary: list[Row]) -> Figure:
    """Perplexity against the number of parameters, a row of panels a text, a column a number of bits."""
    return _by_size(
        summary, measured(summary, "ppl/"), lambda metric: f"perplexity on {metric.split('/')[1]}", log=True
    )


@styled
def zero_shot(summary: list[Row]) -> Figure:
    """Zero-shot accuracy against the number of parameters, with the standard error of the task's samples."""
    metrics: dict[str, str] = {}  # one accuracy a task: the plain one, where it has several
    for name in sorted(measured(summary, "zero_shot/")):
        task, _, metric = name.removeprefix("zero_shot/").partition("/")
        if metric.startswith(("acc", "exact_match")) and not metric.endswith("_stderr"):
            metrics.setdefault(task, name)
    if not metrics:
        raise LeftOut("no run has zero-shot accuracies.")
    return _by_size(
        summary, list(metrics.values()), lambda metric: "accuracy on {1} ({2})".format(*metric.split("/")), log=False
    )


@styled
def seconds(summary: list[Row]) -> Figure:
    """Seconds to quantize a model against its number of parameters, a panel a device."""
    rows = [row for row in having(_quantized(summary), "quantize/seconds") if "device" in row]
    _need_sizes(rows)
    devices = sorted({row["device"] for row in rows})
    look = looks(rows)
    figure, axes = panels(1, len(devices), width=4.4, height=3.6)
    for axis, device in zip(axes[0], devices, strict=True):
        _lines(axis, [row for row in rows if row["device"] == device], "quantize/seconds", look)
        log_axis(axis, "x")
        log_axis(axis, "y")
        axis.set(xlabel="parameters", ylabel="seconds to quantize", title=device)
    legend(figure, look, _fills(rows))
    return figure


def _by_size(summary: list[Row], metrics: list[str], name: Callable[[str], str], log: bool) -> Figure:
    """A row of panels a metric, a column a number of bits; lines through the models of a family."""
    _need_sizes([row for row in summary if any(metric in row for metric in metrics)])
    bits = sorted({row["bits"] for row in _quantized(summary)}, reverse=True)
    look = looks(summary)
    figure, axes = panels(len(metrics), max(len(bits), 1))
    for line, metric in zip(axes, metrics, strict=True):
        for axis, number in zip(line, bits or [None], strict=True):
            shown = having([row for row in summary if row["bits"] in (number, None)], metric)
            _lines(axis, shown, metric, look)
            _name_families(axis, shown, metric)
            log_axis(axis, "x")
            if log:
                log_axis(axis, "y")
            axis.set(xlabel="parameters", ylabel=name(metric), title="" if number is None else f"{number} bits")
    legend(figure, look, _fills(summary))
    return figure


def _lines(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    """A line through the models of a family for every method, number of bits and grid."""
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in having(rows, metric):
        lines.setdefault((row["label"], row["family"], row["bits"], row["grid"]), []).append(row)
    for line in lines.values():
        hollow = is_hollow(line[0]["grid"]) or line[0]["method"] == REFERENCE
        _series(
            axis, sorted(line, key=lambda row: row["parameters"]), "parameters", metric, look, "--" if hollow else "-"
        )


def _name_families(axis: Axes, rows: list[Row], metric: str) -> None:
    """Write each family's name above its largest model, where there are several families."""
    families = dict.fromkeys(row["family"] for row in rows)
    for family in families if len(families) > 1 else ():
        members = [row for row in rows if row["family"] == family]
        top = max(members, key=lambda row: (row["parameters"], row[metric]))
        axis.annotate(
            family, (top["parameters"], top[metric]), (0, 11), textcoords="offset points", fontsize=7, ha="center"
        )


def _series(axis: Axes, rows: list[Row], x: str, y: str, look: Look, line: str) -> None:
    """Points with error bars: a task's standard error where there is one, else the standard deviation over seeds."""
    color, marker = look[rows[0]["label"]]
    errors = [row.get(f"{y}_stderr", row.get(f"{y}{SD}", math.nan)) for row in rows]
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


def measured(rows: list[Row], prefix: str) -> list[str]:
    """The metrics that some row has."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith(prefix) and not name.endswith(SD))
    return [name for name in names if having(rows, name)]


def having(rows: list[Row], metric: str) -> list[Row]:
    """The rows with a number for the metric."""
    values = ((row, row.get(metric)) for row in rows)
    return [row for row, value in values if isinstance(value, int | float) and not math.isnan(value)]


def _quantized(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["method"] != REFERENCE]


def _fills(rows: list[Row]) -> list[Line2D]:
    """What hollow markers mean, where some are."""
    grids = list(dict.fromkeys(row["grid"] for row in rows if is_hollow(row["grid"])))
    if not grids:
        return []
    whole = key("per-channel", marker="o", linestyle="none")
    return [whole, key(" or ".join(grids), marker="o", markerfacecolor=HOLLOW, linestyle="none")]


def _need_sizes(rows: list[Row]) -> None:
    if len({row["parameters"] for row in rows if not math.isnan(row["parameters"])}) < 2:
        raise LeftOut("it needs models of two sizes or more.")

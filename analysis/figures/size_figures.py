"""Perplexity, zero-shot accuracy and time against the size of the model. Lines join the models of a family."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.points import LeftOut, draw_series, fill_keys, having, quantized, texts_of
from analysis.figures.style import Look, is_hollow, legend, log_axis, looks, panels, styled
from analysis.series import Row, all_keys
from runners.results.metrics import (
    QUANTIZE_SECONDS,
    REFERENCE,
    bits_words,
    calibration_seconds,
    ppl,
    zero_shot_parts,
)

SECONDS_CAPTION = "Time to quantize against model size"


@styled
def against_size(summary: list[Row]) -> Figure:
    """Perplexity against the number of parameters; one row of panels per text, one column per number of bits."""
    titles = {ppl(text): f"perplexity on {text}" for text in texts_of(summary)}
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
    rows = [row for row in having(quantized(summary), QUANTIZE_SECONDS) if "device" in row]
    _need_two_sizes(rows)
    devices = sorted({row["device"] for row in rows})
    look = looks(rows)
    figure, axes = panels(1, len(devices), width=4.4, height=3.6)
    for axis, device in zip(axes[0], devices, strict=True):
        _draw_families(axis, [row for row in rows if row["device"] == device], QUANTIZE_SECONDS, look)
        log_axis(axis, "x")
        log_axis(axis, "y")
        axis.set(xlabel="parameters", ylabel="seconds to quantize", title=device)
    legend(figure, look, fill_keys(rows))
    return figure


def seconds_caption(summary: list[Row]) -> str:
    """What the figure of seconds shows, and how much of them is the calibration's, which is much alike for all methods."""
    timed = [(calibration_seconds(row), row[QUANTIZE_SECONDS]) for row in having(quantized(summary), QUANTIZE_SECONDS)]
    shares = [part / whole for part, whole in timed if part is not None and whole > 0]
    if not shares:
        return SECONDS_CAPTION
    low, high = f"{min(shares):.0%}".rstrip("%"), f"{max(shares):.0%}".rstrip("%")
    return f"{SECONDS_CAPTION}; calibration takes {low if low == high else f'{low} to {high}'} % of it"


def _draw_by_size(summary: list[Row], titles: dict[str, str], log: bool) -> Figure:
    """One row of panels per metric (a key and its title), one column per number of bits; lines join a family's models."""
    _need_two_sizes([row for row in summary if any(metric in row for metric in titles)])
    bits = sorted({row["bits"] for row in quantized(summary)}, reverse=True)
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
    legend(figure, look, fill_keys(summary))
    return figure


def _draw_families(axis: Axes, rows: list[Row], metric: str, look: Look) -> None:
    """A line through the models of a family for every method, number of bits and grid."""
    lines: dict[tuple[object, ...], list[Row]] = {}
    for row in having(rows, metric):
        lines.setdefault((row["label"], row["family"], row["bits"], row["grid"]), []).append(row)
    for line in lines.values():
        dashed = is_hollow(line[0]["grid"]) or line[0]["method"] == REFERENCE
        by_size = sorted(line, key=lambda row: row["parameters"])
        draw_series(axis, by_size, "parameters", metric, look, "--" if dashed else "-")


def _name_families(axis: Axes, rows: list[Row], metric: str) -> None:
    """Write each family's name above its largest model, where there are several families."""
    families = dict.fromkeys(row["family"] for row in rows)
    for family in families if len(families) > 1 else ():
        members = [row for row in rows if row["family"] == family]
        top = max(members, key=lambda row: (row["parameters"], row[metric]))
        axis.annotate(
            family, (top["parameters"], top[metric]), (0, 11), textcoords="offset points", fontsize=7, ha="center"
        )


def _need_two_sizes(rows: list[Row]) -> None:
    if len({row["parameters"] for row in rows if not math.isnan(row["parameters"])}) < 2:
        raise LeftOut("it needs models of two sizes or more.")

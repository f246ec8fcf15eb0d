"""All figures of a study: their files and captions, and the reasons why some are left out."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import pandas as pd
from matplotlib.figure import Figure

from analysis.collect import read_tables
from analysis.figures import size_figures
from analysis.figures.energy import ENERGY_CAPTION, token_energy
from analysis.figures.error_figures import ERRORS_CAPTION, errors_and_kl
from analysis.figures.layer_choice import MOST_GRIDS, layer_choices
from analysis.figures.layer_figures import layer_errors
from analysis.figures.pareto import pareto, pareto_caption, pareto_file
from analysis.figures.points import LeftOut, quantized, seed_words
from analysis.figures.sweep_figures import sweep_errors
from analysis.series import Row

Drawing = tuple[str, str, Callable[[], Figure]]  # the file of a figure, its caption, and the function that draws it


def draw(
    frame: pd.DataFrame, summary: list[Row], runs: pd.DataFrame
) -> tuple[dict[str, tuple[str, Figure]], list[str]]:
    """The figures of a study by their files, each with its caption; and why others are left out, a sentence each.

    Args:
        frame: the runs, from `analysis.collect.collect`.
        summary: the series, from `analysis.series.summarize`.
        runs: every run's errors, from `analysis.correlation.run_errors`.
    """
    figures, left_out = {}, []
    for file, caption, function in _drawings(frame, summary, runs):
        try:
            figures[file] = (caption, function())
        except LeftOut as reason:
            left_out.append(f"{caption}: {reason}")
    return figures, left_out


def _drawings(frame: pd.DataFrame, summary: list[Row], runs: pd.DataFrame) -> Iterator[Drawing]:
    layers, sweeps = read_tables(frame, "layers.csv"), read_tables(frame, "sweeps.csv")
    models = list(dict.fromkeys(row["model"] for row in summary))
    for model in models:
        yield pareto_file(model), pareto_caption(summary, model), partial(pareto, summary, model)
    yield "size.png", "Perplexity against model size", partial(size_figures.against_size, summary)
    for model in models:
        yield from _layer_drawings(summary, layers, model)
        errors = partial(sweep_errors, summary, sweeps, model)
        seeds = seed_words([row for row in summary if row["model"] == model])
        yield f"sweeps-{model}.png", f"Relative error by sweep (mean over layers; {seeds}), {model}", errors
        energy = partial(token_energy, summary, layers, model)
        yield f"energy-{model}.png", f"{ENERGY_CAPTION}, {model}", energy
        errors = partial(errors_and_kl, summary, runs, model)
        yield f"errors-{model}.png", f"{ERRORS_CAPTION}, {model}", errors
    yield "zero_shot.png", "Zero-shot accuracy against model size", partial(size_figures.zero_shot, summary)
    yield "seconds.png", size_figures.seconds_caption(summary), partial(size_figures.seconds, summary)


def _layer_drawings(summary: list[Row], layers: pd.DataFrame, model: str) -> Iterator[Drawing]:
    choices = layer_choices(summary, layers, model)
    for choice in choices:
        yield choice.file, choice.caption, partial(layer_errors, choice, layers)
    grids = {row["grid"] for row in quantized(summary) if row["model"] == model}
    others = sorted(grids - {choice.grid for choice in choices})
    if not choices:
        yield (
            "",
            f"Error by layer, {model}",
            partial(_leave_out, f"no quantized run of {model} has measured layer errors."),
        )
    elif others:
        why = f"there are {MOST_GRIDS} grids for each number of bits; a report on some runs alone shows those of these."
        yield "", f"Error by layer, {model}, {' and '.join(others)}", partial(_leave_out, why)


def _leave_out(why: str) -> NoReturn:
    raise LeftOut(why)

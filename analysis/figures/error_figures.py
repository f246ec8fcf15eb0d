"""The KL divergence of every run against its layer errors: whether the error orders the runs."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.correlation import LEAST_RUNS, rank_correlation
from analysis.figures.points import LeftOut
from analysis.figures.style import Look, legend, legend_key, log_axis, looks, panels, styled
from analysis.series import LAYER_ERRORS, Row
from runners.results.metrics import bits_words

ERRORS_CAPTION = (
    "KL divergence against layer error, one point per run, with the rank correlation of all "
    "(near 0: the error does not order the runs; within one number of bits: correlation.md)"
)
MARKERS = "o^sDvPX*"  # one per number of bits, reused in turn


@styled
def errors_and_kl(summary: list[Row], runs: pd.DataFrame, model: str) -> Figure:
    """KL divergence against each layer error, with their rank correlation; one row of panels per text.

    Args:
        summary: the series, from `analysis.series.summarize`.
        runs: every run's errors, from `analysis.correlation.run_errors`.
        model: the model whose runs are shown.
    """
    shown = runs.loc[runs["model"] == model]
    errors = [key for key in LAYER_ERRORS if shown[key].notna().any()]
    texts = [text for text, part in shown.groupby("text", sort=False) if len(part) >= LEAST_RUNS]
    if not texts or not errors:
        most = max(shown["text"].value_counts(), default=0)
        raise LeftOut(f"the KL divergence of {most} quantized runs of {model} is known, and it needs {LEAST_RUNS}.")
    look = looks([row for row in summary if row["series"] in set(shown["series"])])
    bits = sorted(set(shown["bits"]), reverse=True)
    markers = {number: MARKERS[place % len(MARKERS)] for place, number in enumerate(bits)}
    figure, axes = panels(len(texts), len(errors))
    for line, text in zip(axes, texts, strict=True):
        for axis, key in zip(line, errors, strict=True):
            _draw_runs(axis, shown.loc[shown["text"] == text], key, look, markers)
            axis.set(xlabel=f"{LAYER_ERRORS[key]}, mean over layers", ylabel=f"KL on {text}, nats per token")
    keys = [legend_key(bits_words(number), marker=markers[number], linestyle="none") for number in bits]
    legend(figure, {label: (color, "") for label, (color, _) in look.items()}, keys)
    return figure


def _draw_runs(axis: Axes, runs: pd.DataFrame, key: str, look: Look, markers: dict[int, str]) -> None:
    found = rank_correlation(runs, key)
    known = runs.dropna(subset=[key])
    words = "ρ is not defined" if found is None else f"ρ = {found}, {found.runs} runs".replace("-", "−")
    axis.set_title(f"{runs['model'].iloc[0]}: {words}")
    # What is not above zero has no place on a logarithmic axis; the correlation counts it.
    for run in known.loc[(known[key] > 0) & (known["kl"] > 0)].to_dict("records"):
        color = look[run["label"]][0]
        axis.plot(run[key], run["kl"], color=color, marker=markers[run["bits"]], markersize=4, linestyle="none")
    for which in ("x", "y") if axis.lines else ():
        log_axis(axis, which)

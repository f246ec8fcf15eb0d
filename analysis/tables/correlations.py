"""The table of rank correlations: a row per model, text and set of runs, a column per layer error."""

import math

import pandas as pd

from analysis.correlation import LEAST_RUNS, LEAST_SERIES, Correlation
from analysis.series import LAYER_ERRORS
from analysis.tables.comparison import markdown_lines
from analysis.tables.latex import booktabs

TITLE = "Rank correlation of layer errors with the KL divergence from the full-precision model"
ALL_RUNS = "all"
NOTE = (
    "Spearman's ρ over runs, with its 95 % bootstrap interval over series. 1: of two runs, the one with the lower layer "
    "error has the lower KL divergence. Near 0: the layer error does not order the runs. Among all runs the number of "
    "bits orders both; the rows of one number of bits and one group size tell whether the error orders methods. "
    "The relative layer error is that of the calibration's own objective, with the weights of its tokens. "
    f"–: fewer than {LEAST_RUNS} runs have both, or all are the same. Without an interval: fewer than {LEAST_SERIES} series."
)


def correlation_words(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers of `analysis.correlation.correlations` in words; empty where there are none."""
    errors = [name for name in LAYER_ERRORS.values() if name in set(table["error"])]
    rows = []
    for _, part in table.groupby(["model", "text", "bits", "group"], sort=False, dropna=False):
        first = part.iloc[0]
        found = {entry["error"]: _entry(entry) for entry in part.to_dict("records")}
        every = math.isnan(first["bits"])
        named = {"model": first["model"], "text": first["text"]}
        among = {
            "bits": ALL_RUNS if every else f"{first['bits']:g}",
            "group size": ALL_RUNS if every else first["group"],
        }
        counts = {name: _between([str(count) for count in part[name]]) for name in ("runs", "series")}
        rows.append(named | among | counts | {name: found.get(name, "–") for name in errors})
    return pd.DataFrame(rows)


def correlation_markdown(words: pd.DataFrame) -> str:
    """The table in GitHub's Markdown, with its title and note."""
    return "\n\n".join([f"**{TITLE}**", markdown_lines(words), NOTE])


def correlation_latex(words: pd.DataFrame) -> str:
    """The table as LaTeX, for the package booktabs."""
    columns = "llrlrr" + "r" * (len(words.columns) - 6)
    return "% Needs \\usepackage{booktabs}.\n" + booktabs(words, columns, f"{TITLE}. {NOTE}")


def _entry(entry: dict[str, float]) -> str:
    numbers = (entry[name] for name in ("correlation", "low", "high"))
    return str(Correlation(*numbers, runs=int(entry["runs"]), series=int(entry["series"]))).replace("-", "−")


def _between(counts: list[str]) -> str:
    """A number, or the range of several: not every run has every error."""
    return "–".join(dict.fromkeys([min(counts, key=int), max(counts, key=int)]))

"""The table of a study: full precision first, then method by method at each number of bits."""

import math

import pandas as pd

from analysis.collect import REFERENCE
from analysis.intervals import BOLD_NOTE, losses, pairs, winners
from analysis.series import SD, Row, counts, summarize

__all__ = ["comparison", "counts", "lines", "markdown", "notes", "spread"]

RAISED = " †"  # after the name of a method that had to raise its damping in some layer
RAISED_NOTE = "† damping was raised in some layers because the factorization failed: see their layers.csv"
LAYER_ERRORS = {
    "layers/mean_relative_error": "relative layer error",
    "layers/mean_held_out_error": "held-out layer error",  # on sequences that were not used to calibrate
}


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of a study (see `table_of`), from its runs.

    Raises:
        ValueError: no run is done.
    """
    summary = summarize(frame)
    return table_of(summary, winners(pairs(summary, losses(frame))))


def table_of(summary: list[Row], bold: set[tuple[str, str]]) -> pd.DataFrame:
    """One row a series of runs that differ only in their seed: mean ± standard deviation of what is done, as text.

    Perplexities (bold as BOLD_NOTE says), relative layer error on the calibration data and, where it was measured, on
    held-out data, and bits per weight; the number of seeds where it is not the same for all.
    """
    columns = dict.fromkeys(name for row in summary for name in row)
    texts = [name for name in columns if name.startswith("ppl/") and not name.endswith(SD)]
    errors = [name for name in LAYER_ERRORS if name in columns]
    table = pd.DataFrame([_row(row, texts, errors, bold) for row in summary])
    if len({row["seeds"] for row in summary if row["bits"] is not None}) < 2:  # the unquantized model has neither
        del table["seeds"]
    return table


def _row(row: Row, texts: list[str], errors: list[str], bold: set[tuple[str, str]]) -> dict[str, str]:
    quantized = row["method"] != REFERENCE
    cells = {
        "model": row["model"],
        "bits": f"{row['bits']:g}" if quantized else "",
        "grid": row["grid"],
        "method": row["label"] + RAISED * row["damping_raised"],
        "bits per weight": f"{row['bits_per_weight']:.2f}",
    }
    for column in texts:
        text, words = column.removeprefix("ppl/"), spread(row, column, 2)
        cells[text] = f"**{words}**" if (row["series"], text) in bold else words
    for column in errors:
        cells[LAYER_ERRORS[column]] = spread(row, column, 4) if quantized else ""
    return cells | {"seeds": f"{row['seeds']}"}


def spread(row: Row, metric: str, digits: int, scale: float = 1.0) -> str:
    """The mean and, of more than one seed, the (sample) standard deviation; nothing where there is no value."""
    mean, deviation = row.get(metric, math.nan) * scale, row.get(f"{metric}{SD}", math.nan) * scale
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def markdown(table: pd.DataFrame) -> str:
    """A table in GitHub's Markdown, and notes on its marks."""
    return "\n\n".join([lines(table), *notes(table)])


def lines(table: pd.DataFrame) -> str:
    """The lines of a table of words in GitHub's Markdown, numbers to the right."""
    if table.empty:
        return ""
    align = ["left" if name in ("model", "method", "grid") else "right" for name in table.columns]
    return table.to_markdown(index=False, disable_numparse=True, colalign=align)


def notes(table: pd.DataFrame) -> list[str]:
    """What the marks in a table mean."""
    marked = table["method"].str.endswith(RAISED).any()
    bold = any(table[name].str.startswith("**").any() for name in table.columns)
    return [BOLD_NOTE] * bold + [RAISED_NOTE] * bool(marked)

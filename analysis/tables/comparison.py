"""The table of a study: full precision first, then method by method at each number of bits. All entries are text."""

import math
import re

import pandas as pd

from analysis.intervals import BOLD_NOTE, SeriesText, compare_peers, window_losses, winners
from analysis.series import LAYER_ERRORS, Row, all_keys, summarize
from analysis.tables.notes import CALIBRATED_WITH, RAISED, bos_differs, mark_notes, row_notes, stored_words
from runners.results.metrics import BITS_PER_WEIGHT, CALIBRATION_BOS, FAR_MORE_BITS, REFERENCE, bits_text, names, ppl

WORDS = ("model", "method", "grid", "group size", "text", CALIBRATED_WITH)  # columns that are aligned left


def comparison(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of a study (see `comparison_of`), from its runs.

    Raises:
        ValueError: no run is done.
    """
    summary = summarize(frame)
    return comparison_of(summary, winners(compare_peers(summary, window_losses(frame))))


def comparison_of(summary: list[Row], bold: set[SeriesText]) -> pd.DataFrame:
    """One row per series: bits per weight, perplexities and layer errors, as mean ± standard deviation over the seeds.

    Layer errors are those on the calibration data and, where they were measured, on held-out data (see `LAYER_ERRORS`).
    The number of seeds is shown where it is not the same for all, and so is the place of BOS in the calibration sequences.

    Args:
        summary: the series, from `analysis.series.summarize`.
        bold: the series and texts that win, from `analysis.intervals.winners`.
    """
    keys = all_keys(summary)
    errors = [key for key in LAYER_ERRORS if key in keys]
    table = pd.DataFrame([_row(row, names(keys, "ppl"), errors, bold) for row in summary])
    # The unquantized model does not count: it has neither calibration nor seeds.
    if len({row["seeds"] for row in summary if row["bits"] is not None}) < 2:
        del table["seeds"]
    if not bos_differs(summary):
        del table[CALIBRATED_WITH]
    table.attrs["remarks"] = row_notes(summary)
    return table


def _row(row: Row, texts: list[str], errors: list[str], bold: set[SeriesText]) -> dict[str, str]:
    quantized = row["method"] != REFERENCE
    entries = {
        "model": row["model"],
        "bits": bits_text(row["bits"]) if quantized else "",
        "grid": row["grid"],
        "method": row["label"] + RAISED * row["damping_raised"],
        CALIBRATED_WITH: row.get(CALIBRATION_BOS, "") if quantized else "",
        "bits per weight": stored_words(row, f"{row[BITS_PER_WEIGHT]:.2f}"),
    }
    for text in texts:
        words = spread(row, ppl(text), 2)
        entries[text] = f"**{words}**" if (row["series"], text) in bold else words
    for key in errors:
        entries[LAYER_ERRORS[key]] = spread(row, key, 4) if quantized else ""
    return entries | {"seeds": f"{row['seeds']}"}


def spread(row: Row, metric: str, digits: int, scale: float = 1.0) -> str:
    """The mean and, of more than one seed, ± the sample standard deviation; "" where there is no value."""
    mean, deviation = row.get(metric, math.nan) * scale, row["deviations"].get(metric, math.nan) * scale
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{digits}f}")


def markdown(table: pd.DataFrame) -> str:
    """The table in GitHub's Markdown, with the notes that explain its marks."""
    return "\n\n".join([markdown_lines(table), *notes(table)])


def markdown_lines(table: pd.DataFrame) -> str:
    """A table of text in GitHub's Markdown, without notes; what is not a name is aligned right."""
    if table.empty:
        return ""
    align = ["left" if name in WORDS else "right" for name in table.columns]
    # Without numparse, which would print 3.00 as 3.
    safe = table.map(markdown_text).set_axis([markdown_text(str(name)) for name in table.columns], axis=1)
    return safe.to_markdown(index=False, disable_numparse=True, colalign=align)


def markdown_text(text: str) -> str:
    """A name or an error message in one cell of a table: it may have bars and line breaks, and tags that are none."""
    # A single star is part of a pattern; two make a word bold.
    text = re.sub(r"(?<!\*)\*(?!\*)", r"\\*", text)
    return " ".join(text.replace("<", "&lt;").replace("|", "\\|").split("\n"))


def notes(table: pd.DataFrame) -> list[str]:
    """The notes that explain the marks of a table, for those marks that it has, and those about its models."""
    raised = bool(table["method"].str.endswith(RAISED).any())
    bold = any(table[name].str.startswith("**").any() for name in table.columns)
    far_more = bool(table["bits per weight"].str.startswith(FAR_MORE_BITS).any())
    return [BOLD_NOTE] * bold + mark_notes(raised, far_more) + table.attrs.get("remarks", [])

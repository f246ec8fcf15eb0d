"""The page of a report: plain HTML with relative links to its figures and runs, and nothing from elsewhere.

`templates/page.html` has the order of its sections; text is escaped there, whatever it comes from.
"""

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from analysis.intervals import LOWEST_NOTE
from analysis.tables import correlations
from analysis.tables.comparison import notes
from analysis.tables.papers import PaperTable, layout

LEFT = (
    "model",
    "method",
    "grid",
    "group size",
    "text",
    "what",
    "why",
    "device",
    "commit",
)  # columns of words; numbers go right
GROUPED_BY = ("model", "bits", "grid")  # a line separates rows that differ in one of these


@dataclass
class Report:
    """Everything that a report shows."""

    study: str
    conditions: dict[str, str]  # which runs, as written on the command line
    comparison: pd.DataFrame
    papers: list[PaperTable]
    intervals: pd.DataFrame
    correlations: pd.DataFrame  # in words; empty where too few runs have a KL divergence
    figures: dict[str, tuple[str, Figure]]  # for each file: its caption and the figure
    left_out: list[str]  # figures that the study has no numbers for, each with the reason
    missing: pd.DataFrame  # runs that are not done, and metrics that were skipped
    provenance: pd.DataFrame


@dataclass(frozen=True)
class PageTable:
    """A table as the template shows it: entries are text, or an `Entry` of analysis.tables.papers."""

    header: list[str]
    rows: list[list[Any]]

    def css_class(self, name: str) -> str:
        """The classes of a column: `l` for left, `w` for one that wraps."""
        return "l w" if name == "why" else "l" if name in LEFT else ""

    def group(self, row: list[Any]) -> list[Any]:
        """The entries that rows of one group have in common."""
        return [entry for name, entry in zip(self.header, row, strict=True) if name in GROUPED_BY]


def page(report: Report) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("analysis.tables"),
        autoescape=True,  # names and error messages come from outside
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bold"] = _bold
    return environment.get_template("page.html").render(
        report=report,
        comparison=_frame(report.comparison),
        comparison_notes=notes(report.comparison),
        papers=[(table, PageTable(*layout(table, lambda entry: entry))) for table in report.papers],
        intervals=_frame(report.intervals),
        lowest_note=LOWEST_NOTE,
        correlations=_frame(report.correlations),
        correlation_title=correlations.TITLE,
        correlation_note=correlations.NOTE,
        missing=_frame(report.missing),
        provenance=_frame(report.provenance),
    )


def _frame(table: pd.DataFrame) -> PageTable:
    return PageTable(list(table.columns), [[_words(entry) for entry in row] for row in table.to_numpy().tolist()])


def _words(entry: object) -> str:
    """An entry of a frame as text, a gap as nothing."""
    if entry is None or entry != entry:  # None or NaN
        return ""
    return f"{entry:g}" if isinstance(entry, int | float) else str(entry)


def _bold(words: str) -> Markup:
    """Escaped text in which `**words**`, as Markdown has it, is bold."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(words))))

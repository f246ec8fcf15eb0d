"""The page of a report: one HTML file with relative links to its figures and runs, and nothing from elsewhere.

`templates/page.html` has the order of its sections; text is escaped there, whatever it comes from. Tables and figures are
plain HTML and PNG, which the embedded libraries (see `libraries`) make sortable and zoomable; without JavaScript they stay
as they are. The page's own security policy forbids every request but those for its images.
"""

import re
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from analysis.intervals import LOWEST_NOTE
from analysis.tables import correlations, libraries
from analysis.tables.comparison import notes
from analysis.tables.notes import CALIBRATED_WITH
from analysis.tables.papers import PaperTable, layout

LEFT = (
    "model",
    "method",
    "grid",
    "group size",
    "text",
    "what",
    "why",
    CALIBRATED_WITH,
    "device",
    "commit",
)  # columns of words; numbers go right
PICKED = ("model", "method", "bits", "grid", "device")  # columns whose heads offer their values to choose from
FIRST = "method"  # the column that stays in view, where there is one
GROUPED_BY = ("model", "bits", "grid")  # a line separates rows that differ in one of these


@dataclass
class Report:
    """Everything that a report shows."""

    study: str
    sentences: list[str]  # what the study says, in short
    conditions: dict[str, str]  # which runs, as written on the command line
    comparison: pd.DataFrame
    papers: list[PaperTable]
    intervals: pd.DataFrame
    correlations: pd.DataFrame  # in words; empty where too few runs have a KL divergence
    figures: dict[str, tuple[str, Figure]]  # for each file: its caption and the figure
    charts: dict[str, list[dict[str, Any]]]  # for some files: what shows the same to zoom, as Vega-Lite specifications
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
        left = ["l"] if name in LEFT else []
        return " ".join(left + ["w"] * (name == "why") + ["pick"] * (name in PICKED))

    def order(self, name: str, entry: Any) -> str | None:
        """What a column of numbers is sorted by; gaps come first. None for words."""
        if name in LEFT:
            return None
        if isinstance(entry, dict):
            return f"{entry['value']:.6g}"
        number = re.match(r"\W*?(-?\d+(\.\d+)?(e[+-]?\d+)?)", entry.replace("−", "-"))
        return number[1] if number else "-1e9"

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
    tables, style = libraries.datatables()
    return environment.get_template("page.html").render(
        report=report,
        contents=[],  # filled by the template with the titles of its sections
        library_tables=Markup(tables),  # scripts and styles of ours are not escaped
        library_style=Markup(style),
        library_figures=Markup(libraries.vega()) if report.charts else "",
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
    names = sorted(table.columns, key=lambda name: name != FIRST)  # the others keep their order
    return PageTable(names, [[_words(entry) for entry in row] for row in table[names].to_numpy().tolist()])


def _words(entry: object) -> str:
    """An entry of a frame as text, a gap as nothing."""
    if entry is None or entry != entry:  # None or NaN
        return ""
    return f"{entry:g}" if isinstance(entry, int | float) else str(entry)


def _bold(words: str) -> Markup:
    """Escaped text in which `**words**`, as Markdown has it, is bold."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(words))))

"""Tables as the papers have them: a row a method and number of bits, a column a model, one table a text.

Every cell is a row of a long table first (`Paper.cells`, which is what the CSV holds): its value, the runs it comes from,
and the published number beside it. Markdown, LaTeX and HTML are layouts of these.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.intervals import BOLD_NOTE
from analysis.published import beside
from analysis.series import SD, Row, protocol
from analysis.tables.comparison import RAISED, RAISED_NOTE, lines, spread

SUPERSCRIPTS = "ᵃᵇᶜᵈᵉᶠᵍʰ"
PERCENT = ("acc", "top1", "exact_match")  # how the names of shares begin; tables show them in per cent

Cell = Row  # a dictionary as well


@dataclass(frozen=True)
class Metric:
    """A measured number that a table shows: its column, a title, and how it is printed."""

    column: str
    title: str
    digits: int
    scale: float = 1.0

    @property
    def slug(self) -> str:
        """Its name as a file's."""
        return self.column.replace("ppl/", "perplexity/").replace("/", "-").replace(",", "-")

    @property
    def text(self) -> str | None:
        """The text, if this is a perplexity."""
        return self.column.removeprefix("ppl/") if self.column.startswith("ppl/") else None


@dataclass(frozen=True)
class Paper:
    """A table: its metric, the models that are its columns, its cells, and the sources of the published numbers."""

    metric: Metric
    models: list[str]
    cells: list[Cell]
    sources: list[str]

    @property
    def notes(self) -> list[str]:
        """What stands below the table."""
        marked = [f"{SUPERSCRIPTS[place]} published: {source}" for place, source in enumerate(self.sources)]
        beside_note = ["In brackets: the published number and ours less the published one."] * bool(marked)
        bold = [BOLD_NOTE] * (any(cell["bold"] for cell in self.cells))
        return beside_note + marked + bold + [RAISED_NOTE] * any(cell["damping_raised"] for cell in self.cells)


def metrics(summary: list[Row]) -> list[Metric]:
    """What was measured on texts and tasks: perplexities, agreement with full precision, zero-shot accuracies."""
    found = []
    for column in dict.fromkeys(name for row in summary for name in row if not name.endswith(SD)):
        kind, _, rest = column.partition("/")
        name, _, what = rest.partition("/")
        percent = what.startswith(PERCENT)
        if kind == "ppl":
            found.append(Metric(column, f"Perplexity on {name} (protocol {protocol(summary, name)})", 2))
        elif kind == "agreement":
            titles = {
                "kl": "KL divergence from the full-precision model, nats a token",
                "top1": "Same top token as full precision, %",
            }
            digits = 2 if percent else 4
            found.append(Metric(column, f"{titles.get(what, what)}, on {name}", digits, 100.0 if percent else 1.0))
        elif kind == "zero_shot" and what not in ("", "samples", "version", "sha256") and not what.endswith("_stderr"):
            unit = f"{what}, %" if percent else what
            found.append(Metric(column, f"Zero-shot {name}: {unit}", 1 if percent else 4, 100.0 if percent else 1.0))
    return found


def paper(summary: list[Row], metric: Metric, bold: set[tuple[str, str]], numbers: list[Row]) -> Paper:
    """The table of one metric.

    Args:
        summary: the series, from `analysis.series.summarize`.
        metric: what the cells show.
        bold: the (series, text) that win, from `analysis.intervals.winners`.
        numbers: what others published, from `analysis.published.published`.
    """
    rows = [row for row in summary if not math.isnan(row.get(metric.column, math.nan))]
    order = sorted(rows, key=lambda row: row["rank"])
    others = [beside(numbers, row, metric.text) if metric.text else [] for row in order]
    sources = list(dict.fromkeys(f"{one['where']}, {one['url']}" for found in others for one in found))
    cells = [_cell(row, metric, bold, found, sources) for row, found in zip(order, others, strict=True)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    return Paper(metric, models, cells, sources)


def _cell(row: Row, metric: Metric, bold: set[tuple[str, str]], found: list[Row], sources: list[str]) -> Cell:
    value = row[metric.column] * metric.scale
    notes = []
    for one in found:
        printed, mark = one["perplexity"], SUPERSCRIPTS[sources.index(f"{one['where']}, {one['url']}")]
        notes.append(f"{printed}{mark} {_difference(value - float(printed), printed)}")
    return {
        "model": row["model"],
        "method": row["label"],
        "bits": row["bits"],
        "grid": row["grid"],
        "bits_per_weight": row["bits_per_weight"],
        "value": value,
        "sd": row.get(f"{metric.column}{SD}", math.nan) * metric.scale,
        "seeds": row["seeds"],
        "bold": (row["series"], metric.text) in bold,
        "printed": spread(row, metric.column, metric.digits, metric.scale),
        "published": "; ".join(one["perplexity"] for one in found),
        "difference": "; ".join(_difference(value - float(one["perplexity"]), one["perplexity"]) for one in found),
        "source": "; ".join(f"{one['where']}, {one['url']}" for one in found),
        "beside": "; ".join(notes),
        "damping_raised": row["damping_raised"],
        "runs": "; ".join("/".join(folder.replace("\\", "/").split("/")[-2:]) for folder in row["folders"]),
    }


def _difference(value: float, printed: str) -> str:
    return (f"{value:+.1e}" if "e" in printed else f"{value:+.2f}").replace("-", "−", 1)


def layout(table: Paper, write: Callable[[Cell], str]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of the wide table, each cell as `write` writes it; one without a run is empty."""
    rows: dict[tuple[Any, ...], dict[str, Cell]] = {}
    for cell in table.cells:
        bits = "" if cell["bits"] is None or cell["bits"] != cell["bits"] else f"{cell['bits']:g}"
        rows.setdefault((cell["method"], bits, cell["grid"]), {})[cell["model"]] = cell
    written = []
    for (method, bits, grid), cells in rows.items():
        raised = RAISED * any(cell["damping_raised"] for cell in cells.values())
        weights = [f"{cell['bits_per_weight']:.2f}" for cell in cells.values()]
        stored = "–".join(dict.fromkeys([min(weights, key=float), max(weights, key=float)]))
        written.append(
            [method + raised, bits, grid, stored, *(write(cells[m]) if m in cells else "" for m in table.models)]
        )
    return ["method", "bits", "grid", "bits per weight", *table.models], written


def markdown(table: Paper) -> str:
    """GitHub's Markdown, with the notes below."""
    header, rows = layout(table, _markdown_cell)
    wide = lines(pd.DataFrame(rows, columns=pd.Index(header)))
    return "\n\n".join([f"**{table.metric.title}**", wide, *table.notes])


def _markdown_cell(cell: Cell) -> str:
    words = f"**{cell['printed']}**" if cell["bold"] else cell["printed"]
    return f"{words} ({cell['beside']})" if cell["beside"] else words

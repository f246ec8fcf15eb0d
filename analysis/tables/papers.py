"""Tables in the form of the papers: a row per method, bits and grid, a column per model, a table per metric.

Every number is first an `Entry` of a long table (which is the CSV file): its value, the runs behind it, and the published
number beside it. Markdown, LaTeX and HTML lay these out.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.intervals import BOLD_NOTE, SeriesText
from analysis.published import comparable
from analysis.series import Row, all_keys, model_notes, protocol_of
from analysis.tables.comparison import markdown_lines, markdown_text, spread
from analysis.tables.notes import RAISED, bos_notes, calibration_notes, fallback_notes, mark_notes, stored_words
from runners.results.metrics import (
    BITS_PER_WEIGHT,
    KL_FLOOR,
    MEASURED_HOW,
    agreement,
    bits_text,
    floor_words,
    names,
    ppl,
    stores_far_more,
    zero_shot_parts,
)

SUPERSCRIPTS = "ᵃᵇᶜᵈᵉᶠᵍʰ"  # one per source of published numbers
PERCENT = ("acc", "top1", "exact_match")  # how the names of shares begin; tables show them in per cent

Entry = Row  # a number of a table with all that belongs to it; its keys are the columns of the CSV file


@dataclass(frozen=True)
class Metric:
    """A measured number that a table shows."""

    key: str  # in metrics.json
    title: str
    digits: int
    scale: float = 1.0
    text: str | None = None  # that it is the perplexity of; None for other metrics

    @property
    def slug(self) -> str:
        """The name of the table's files."""
        name = f"perplexity/{self.text}" if self.text else self.key
        return re.sub(r"[^\w.+-]", "_", name.replace("/", "-").replace(",", "-"))


@dataclass(frozen=True)
class PaperTable:
    """The table of one metric."""

    metric: Metric
    models: list[str]  # the columns
    entries: list[Entry]
    sources: list[str]  # of the published numbers, in the order of their superscripts
    remarks: list[str]  # about the models and what was calibrated on

    @property
    def notes(self) -> list[str]:
        """The notes below the table."""
        marked = [f"{mark} published: {source}" for mark, source in zip(SUPERSCRIPTS, self.sources, strict=False)]
        brackets = ["In brackets: the published number, and ours minus it."] * bool(marked)
        bold = [BOLD_NOTE] * any(entry["bold"] for entry in self.entries)
        raised = any(entry["damping_raised"] for entry in self.entries)
        far_more = any(stores_far_more(entry) for entry in self.entries)
        return brackets + marked + bold + mark_notes(raised, far_more) + self.remarks


def table_metrics(summary: list[Row]) -> list[Metric]:
    """Everything that was measured on texts and tasks: perplexities, agreement with full precision, zero-shot results."""
    keys = all_keys(summary)
    found = {ppl(text): _perplexity(summary, text) for text in names(keys, "ppl")}
    for text in dict.fromkeys(name.split("/")[0] for name in names(keys, "agreement")):
        kl, top1 = agreement(text, "kl"), agreement(text, "top1")
        found[kl] = Metric(kl, f"KL divergence from the full-precision model, nats per token, on {text}", 4)
        found[top1] = Metric(top1, f"Same top token as full precision, %, on {text}", 2, 100.0)
    for key in keys:
        if (parts := zero_shot_parts(key)) and parts[1] not in MEASURED_HOW and not parts[1].endswith("_stderr"):
            found[key] = _zero_shot(key, *parts)
    return [found[key] for key in keys if key in found]


def _perplexity(summary: list[Row], text: str) -> Metric:
    return Metric(ppl(text), f"Perplexity on {text} (protocol {protocol_of(summary, text)})", 2, text=text)


def _zero_shot(key: str, task: str, metric: str) -> Metric:
    if metric.startswith(PERCENT):
        return Metric(key, f"Zero-shot {task}: {metric}, %", 1, 100.0)
    return Metric(key, f"Zero-shot {task}: {metric}", 4)


def paper_table(summary: list[Row], metric: Metric, bold: set[SeriesText], published: list[Row]) -> PaperTable:
    """The table of one metric.

    Args:
        summary: the series, from `analysis.series.summarize`.
        metric: the number that it shows.
        bold: the series and texts that win, from `analysis.intervals.winners`.
        published: the numbers of others, from `analysis.published.published_numbers`.
    """
    rows = [row for row in summary if not math.isnan(row.get(metric.key, math.nan))]
    order = sorted(rows, key=lambda row: row["rank"])  # across models, so that all share one order of the rows
    others = [comparable(published, row, metric.text) if metric.text else [] for row in order]
    sources = list(dict.fromkeys(_source(number) for numbers in others for number in numbers))
    entries = [_entry(row, metric, bold, numbers, sources) for row, numbers in zip(order, others, strict=True)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    return PaperTable(metric, models, entries, sources, _remarks(rows, summary, metric))


def _remarks(rows: list[Row], summary: list[Row], metric: Metric) -> list[str]:
    on_text = metric.text is not None or bool(names([metric.key], "agreement"))
    calibrated = calibration_notes(rows) if on_text else []  # which say of texts that they were calibrated on
    noise = _noise_floors(rows, summary, metric)
    return [*noise, *model_notes(rows), *calibrated, *bos_notes(rows), *fallback_notes(rows)]


def _noise_floors(rows: list[Row], summary: list[Row], metric: Metric) -> list[str]:
    """Of a KL divergence: how far the unquantized model is from itself, rounded once more in every block."""
    texts = [name.split("/")[0] for name in names([metric.key], "agreement")]
    if metric.key not in (agreement(text, "kl") for text in texts):
        return []
    key, shown = agreement(texts[0], KL_FLOOR), {row["model"] for row in rows}
    floors = [f"{row['model']} {floor_words(row[key])}" for row in summary if key in row and row["model"] in shown]
    return [f"Noise floor, below which a difference is none: {'; '.join(floors)}"] * bool(floors)


def _entry(row: Row, metric: Metric, bold: set[SeriesText], published: list[Row], sources: list[str]) -> Entry:
    value = row[metric.key] * metric.scale
    printed = [number["perplexity"] for number in published]
    differences = [_difference(value, number) for number in printed]
    marks = [SUPERSCRIPTS[sources.index(_source(number))] for number in published]
    return {
        "model": row["model"],
        "method": row["label"],
        "bits": row["bits"],
        "grid": row["grid"],
        BITS_PER_WEIGHT: row[BITS_PER_WEIGHT],
        "value": value,
        "sd": row["deviations"].get(metric.key, math.nan) * metric.scale,
        "seeds": row["seeds"],
        "bold": (row["series"], metric.text) in bold,
        "printed": spread(row, metric.key, metric.digits, metric.scale),
        "published": "; ".join(printed),
        "difference": "; ".join(differences),
        "source": "; ".join(map(_source, published)),
        "beside": "; ".join(f"{n}{m} {d}" for n, m, d in zip(printed, marks, differences, strict=True)),
        "damping_raised": row["damping_raised"],
        "runs": "; ".join(row["places"]),
        "places": row["places"],
    }


def _source(number: Row) -> str:
    return f"{number['where']}, {number['url']}"


def _difference(value: float, printed: str) -> str:
    """Ours minus the published number, with a sign, in the published number's notation (`1.3e4` has two digits)."""
    difference = value - float(printed)
    return (f"{difference:+.1e}" if "e" in printed else f"{difference:+.2f}").replace("-", "−", 1)


def layout(table: PaperTable, write: Callable[[Entry], Any]) -> tuple[list[str], list[list[Any]]]:
    """The header and rows of the wide table, each entry as `write` returns it; "" for a model without a run."""
    rows: dict[tuple[Any, ...], dict[str, Entry]] = {}
    for entry in table.entries:
        bits = "" if entry["bits"] is None or entry["bits"] != entry["bits"] else bits_text(entry["bits"])
        rows.setdefault((entry["method"], bits, entry["grid"]), {})[entry["model"]] = entry
    written = []
    for (method, bits, grid), entries in rows.items():
        raised = RAISED * any(entry["damping_raised"] for entry in entries.values())
        # Bits per weight depend on the shapes of a model's layers: a range over the models of the row.
        stored = [f"{entry[BITS_PER_WEIGHT]:.2f}" for entry in entries.values()]
        between = "–".join(dict.fromkeys([min(stored, key=float), max(stored, key=float)]))
        most = max(entries.values(), key=lambda entry: entry[BITS_PER_WEIGHT])
        numbers = [write(entries[model]) if model in entries else "" for model in table.models]
        written.append([method + raised, bits, grid, stored_words(most, between), *numbers])
    return ["method", "bits", "grid", "bits per weight", *table.models], written


def markdown(table: PaperTable) -> str:
    """The table in GitHub's Markdown, with its title and notes."""
    header, rows = layout(table, _markdown_entry)
    wide = markdown_lines(pd.DataFrame(rows, columns=pd.Index(header)))
    return "\n\n".join([f"**{markdown_text(table.metric.title)}**", wide, *table.notes])


def _markdown_entry(entry: Entry) -> str:
    words = f"**{entry['printed']}**" if entry["bold"] else entry["printed"]
    return f"{words} ({entry['beside']})" if entry["beside"] else words

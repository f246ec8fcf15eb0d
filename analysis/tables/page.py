"""The page of a report: plain HTML with relative links to its figures and to the runs, and nothing from elsewhere."""

import re
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

import pandas as pd

from analysis.intervals import LOWEST_NOTE
from analysis.tables.comparison import notes
from analysis.tables.papers import Cell, Paper, layout

if TYPE_CHECKING:
    from analysis.report import Report

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; padding: 0 1.5rem; max-width: 76rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { margin: 1.5rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #555; } tbody tr:nth-child(even) { background: #f5f5f5; }
.l { text-align: left; } .w { white-space: normal; max-width: 40rem; }
tr.first td { border-top: 1px solid #bbb; }
td a { color: inherit; text-decoration-color: #aaa; } sup { line-height: 0; }
sup a { color: #666; text-decoration: none; margin-left: .15em; }
.published { color: #666; font-size: 12px; } .note { color: #555; font-size: 13px; max-width: 60rem; }
figure { margin: 1.5rem 0; } figcaption { color: #555; } img { max-width: 100%; height: auto; }
"""
LEFT = ("model", "method", "grid", "text", "what", "why", "device", "commit")


def page(report: "Report") -> str:
    """The whole page."""
    kept = [f"{name}={value}" for name, value in report.conditions.items()]
    only = f"<p>Only runs with {escape(', '.join(kept))}, and the unquantized ones.</p>" if kept else ""
    title = f"Study {escape(report.study)}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            only,
            *_section("All methods", [_frame(report.comparison), *_notes(notes(report.comparison))]),
            *_section("Figures", [*_figures(report), *_notes(report.left_out, "Left out. ")]),
            *_section("Tables", (_paper(table) for table in report.papers)),
            *_section("Ratios to the lowest perplexity", _intervals(report)),
            *_section("Missing", _missing(report)),
            *_section("Where the numbers come from", [_frame(report.provenance)]),
            "</body></html>",
        ]
    )


def _section(title: str, parts: Iterable[str]) -> list[str]:
    found = list(parts)
    return [f"<section><h2>{title}</h2>", *found, "</section>"] if found else []


def _figures(report: "Report") -> Iterable[str]:
    for file, (caption, figure) in report.figures.items():
        text, width = escape(caption), round(100 * figure.get_figwidth())  # letters of one size in all figures
        image = f'<img src="{escape(file)}" width="{width}" alt="{text}">'
        yield f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _intervals(report: "Report") -> Iterable[str]:
    if len(report.intervals):
        yield _frame(report.intervals)
        yield from _notes([LOWEST_NOTE])


def _missing(report: "Report") -> Iterable[str]:
    if len(report.missing):
        rows = [[_plain(entry) for entry in row[:-1]] + [_link(row[-1])] for row in report.missing.to_numpy().tolist()]
        yield _table([*report.missing.columns[:-1], "see"], rows)


def _plain(entry: object) -> str:
    """An entry of a frame, a gap as nothing."""
    if entry is None or entry != entry:
        return ""
    return f"{entry:g}" if isinstance(entry, int | float) else _text(str(entry))


def _paper(table: Paper) -> str:
    header, rows = layout(table, _cell)
    written = [[*map(_text, row[:4]), *row[4:]] for row in rows]
    files = " ".join(f'<a href="{table.metric.slug}.{kind}">{kind}</a>' for kind in ("md", "tex", "csv"))
    title = f"<h3>{escape(table.metric.title)}</h3>"
    return "\n".join([title, _table(header, written), *_notes(table.notes), f'<p class="note">As {files}.</p>'])


def _cell(cell: Cell) -> str:
    """A value that links to its run; of several seeds, small numbers behind it link to one run each."""
    runs = cell["runs"].split("; ")
    value = f"<strong>{_text(cell['printed'])}</strong>" if cell["bold"] else _text(cell["printed"])
    if len(runs) == 1:
        value = f'<a href="../{escape(runs[0])}">{value}</a>'
    else:
        links = (f'<a href="../{escape(run)}" title="{escape(run)}">{place}</a>' for place, run in enumerate(runs, 1))
        value = f"{value}<sup>{''.join(links)}</sup>"
    return f'{value} <span class="published">({_text(cell["beside"])})</span>' if cell["beside"] else value


def _frame(table: pd.DataFrame) -> str:
    return _table(list(table.columns), [[_text(str(entry)) for entry in row] for row in table.to_numpy().tolist()])


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A table; the cells are HTML already. A line separates the blocks of bits and grid."""
    sides = [" class=l" if name in LEFT else "" for name in header]
    sides = [' class="l w"' if name == "why" else side for name, side in zip(header, sides, strict=True)]
    block = [place for place, name in enumerate(header) if name in ("model", "bits", "grid")]
    head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(header, sides, strict=True))
    lines, last = [], None
    for row in rows:
        now = [row[place] for place in block]
        mark = ' class="first"' if last is not None and now != last else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td{s}>{c}</td>" for s, c in zip(sides, row, strict=True)) + "</tr>")
        last = now
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _notes(found: Iterable[str], before: str = "") -> list[str]:
    return [f'<p class="note">{before}{escape(note)}</p>' for note in found]


def _link(folder: str) -> str:
    model, run = folder.replace("\\", "/").split("/")[-2:]
    return f'<a href="../{escape(model)}/{escape(run)}">{escape(run)}</a>'


def _text(words: str) -> str:
    """Plain text, and bold as Markdown has it."""
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(words))

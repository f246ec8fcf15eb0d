"""Tables as LaTeX, for the package booktabs."""

import pandas as pd

from analysis.tables.papers import SUPERSCRIPTS, Entry, PaperTable, layout

SPECIAL = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "ρ": r"$\rho$",
    "²": "$^2$",
}
SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {"\n": " ", "\r": " "}  # a blank line would end the caption
SPECIAL |= {mark: f"$^{{{letter}}}$" for mark, letter in zip(SUPERSCRIPTS, "abcdefgh", strict=True)}


def latex(table: PaperTable) -> str:
    """A `table` environment. The notes are part of its caption, so that no mark goes without its explanation."""
    header, rows = layout(table, _entry)
    caption = ". ".join(note.rstrip(".") for note in (table.metric.title, *table.notes)) + "."
    # The first four columns are words of this program, the others are LaTeX already.
    wide = pd.DataFrame([[*map(escape, row[:4]), *row[4:]] for row in rows], columns=pd.Index(map(escape, header)))
    runs = f"% The runs behind every number: {table.metric.slug}.csv. Needs \\usepackage{{booktabs}}.\n"
    return runs + _booktabs(wide, "lrlr" + "r" * len(table.models), caption)


def booktabs(table: pd.DataFrame, columns: str, caption: str) -> str:
    """A `table` environment of a table of plain text; `columns` has the letter of every column's alignment."""
    escaped = [[escape(entry) for entry in row] for row in table.to_numpy().tolist()]
    return _booktabs(pd.DataFrame(escaped, columns=pd.Index(map(escape, table.columns))), columns, caption)


def _booktabs(table: pd.DataFrame, columns: str, caption: str) -> str:
    """The same of entries that are LaTeX already."""
    return table.style.hide(axis="index").to_latex(
        column_format=columns, position_float="centering", hrules=True, caption=escape(caption)
    )


def escape(text: str) -> str:
    """Plain text with LaTeX's special characters, and the signs that tables use, written as commands."""
    return text.translate(str.maketrans(SPECIAL))


def _entry(entry: Entry) -> str:
    words = escape(entry["printed"])
    words = f"\\textbf{{{words}}}" if entry["bold"] else words
    return f"{words} {{\\scriptsize ({escape(entry['beside'])})}}" if entry["beside"] else words

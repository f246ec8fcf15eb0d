"""A paper's table in LaTeX, for the package booktabs."""

from analysis.tables.papers import SUPERSCRIPTS, Cell, Paper, layout

SPECIAL = {"\\": r"\textbackslash{}", "±": r"$\pm$", "−": "$-$", "–": "--", "†": r"$\dagger$", "²": "$^2$"}
SPECIAL |= {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {mark: f"$^{{{letter}}}$" for mark, letter in zip(SUPERSCRIPTS, "abcdefgh", strict=True)}


def latex(table: Paper) -> str:
    """A `table` environment; the notes are its caption, so that no mark stands unexplained."""
    header, rows = layout(table, _cell)
    columns = "lrlr" + "r" * (len(header) - 4)
    caption = escape(". ".join(note.rstrip(".") for note in (table.metric.title, *table.notes)) + ".")
    lines = [
        f"% The runs of every cell: {table.metric.slug}.csv. Needs \\usepackage{{booktabs}}.",
        r"\begin{table}",
        r"\centering",
        f"\\caption{{{caption}}}",
        f"\\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _row([escape(name) for name in header]),
        r"\midrule",
        *(_row([*map(escape, row[:4]), *row[4:]]) for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Plain text with LaTeX's special characters written out."""
    return "".join(SPECIAL.get(sign, sign) for sign in text)


def _row(cells: list[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(cell: Cell) -> str:
    words = escape(cell["printed"])
    words = f"\\textbf{{{words}}}" if cell["bold"] else words
    return f"{words} {{\\scriptsize ({escape(cell['beside'])})}}" if cell["beside"] else words

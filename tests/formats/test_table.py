"""The committed table of formats: it has every row, and says why where the perplexity is not the same."""

import csv
from typing import Any

from tests.format_table import CSV, IN, OUT, PAGE, TABLE, Row, page


def committed() -> list[Row]:
    with (TABLE / CSV).open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [_row(row) for row in rows]


def _row(cells: dict[str, Any]) -> Row:
    numbers: dict[str, Any] = {name: float(cells[name]) for name in ("before", "after")}
    return Row(**(cells | numbers))


def test_every_format_is_in_the_table() -> None:
    rows = committed()
    assert [row.direction for row in rows] == ["out"] * len(OUT) + ["in"] * len(IN)
    for row, (layout, settings) in zip(rows[: len(OUT)], OUT, strict=True):
        assert row.layout.startswith(layout)
        assert row.settings == " ".join(settings)


def test_the_perplexity_after_is_the_one_before_or_the_table_says_why_not() -> None:
    for row in committed():
        assert row.before > 1
        assert row.before == row.after or abs(row.after / row.before - 1) < 0.01
        assert row.before == row.after or row.why, row


def test_the_page_is_the_table() -> None:
    assert (TABLE / PAGE).read_text(encoding="utf-8") == page(committed())

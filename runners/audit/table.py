"""The result of an audit: `audit.csv`, and the worst layers in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from runners.audit.layers import ALL, Change
from runners.kept.run import Records
from runners.results.run_folder import write_csv

# What layers.csv says of the same layers; columns that a run of an older version lacks are left out.
FROM_LAYERS = (
    "relative_error",
    "held_out_error",
    "token_error",
    "energy_top_percent",
    "energy_max_over_median",
    "energy_position",
    "energy_position_share",
)

Row = dict[str, Any]


def rows_of(changes: Sequence[Change], records: Records, facts: Row) -> list[Row]:
    """The rows of `audit.csv`.

    Args:
        changes: what was measured.
        records: the rows of the run's `layers.csv`.
        facts: of the audit, the same in every row.
    """
    known = [name for name in FROM_LAYERS if any(name in record for record in records.values())]
    with_restored = any(change.restored for change in changes)
    rows = []
    for change in changes:
        measured = {name: _written(value) for name, value in change.alone.row.items()}
        restored = {"kl_restored": _written(change.restored.kl if change.restored else None)} if with_restored else {}
        record = {} if change.block is None else records.get((change.block, change.layer), {})
        row = {"block": change.block, "layer": change.layer} | measured | restored
        rows.append(row | {name: record.get(name, "") for name in known} | facts)
    return rows


def write_rows(file: Path, rows: list[Row]) -> None:
    """Write the rows as CSV: whole, or not at all."""
    write_csv(file, list(rows[0]), rows)


def worst_tables(changes: Sequence[Change], records: Records, count: int) -> Group:
    """The layers with the largest KL, the same of whole blocks, and below them what the whole model has lost."""
    tables = [_worst(units, records, count) for units in _kinds(changes).values() if units]
    return Group(*tables, Text("; ".join(_summary(changes)), style="dim"))


def _kinds(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """The changes of single layers, and those of whole blocks."""
    units = changes[2:]  # after the unquantized model and the quantized one
    return {
        "layers": [unit for unit in units if unit.layer != ALL],
        "blocks": [unit for unit in units if unit.layer == ALL],
    }


def _worst(units: Sequence[Change], records: Records, count: int) -> Table:
    ranked = sorted(units, key=lambda unit: unit.alone.kl, reverse=True)
    columns = [_cells(unit, sum(unit.alone.kl for unit in units), records) for unit in ranked[:count]]
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in columns[0]:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=name == "layer")
    for cells in columns:
        table.add_row(*cells.values())
    return table


def _cells(unit: Change, total: float, records: Records) -> dict[str, str]:
    """A row of the table, by its headings."""
    alone = unit.alone
    record = {} if unit.block is None else records.get((unit.block, unit.layer), {})
    cells = {"block": str(unit.block), "layer": unit.layer, "KL\nalone": f"{alone.kl:.1e}"}
    cells["% of\nsum"] = f"{100 * alone.kl / total:.1f}" if total > 0 else ""
    cells |= {"KL\np99": f"{alone.kl_p99:.1e}", "ppl": f"{alone.ppl:.2f}"}
    if unit.restored is not None:
        cells["KL if\nrestored"] = f"{unit.restored.kl:.4f}"
    cells["% in 1 %\nof tokens"] = "" if alone.share_top_percent is None else f"{100 * alone.share_top_percent:.0f}"
    cells["KL at\n0 to 3"] = f"{alone.kl_first_positions:.1e}"
    cells["KL at\nothers"] = "" if alone.kl_rest is None else f"{alone.kl_rest:.1e}"
    if error := record.get("relative_error"):
        cells["layer\nerror"] = f"{float(error):.1e}"
    return cells


def _summary(changes: Sequence[Change]) -> list[str]:
    """What the whole model has lost, beside the sum of its parts."""
    unquantized, whole = (change.alone for change in changes[:2])
    said = [f"perplexity {unquantized.ppl:.3f} unquantized, {whole.ppl:.3f} quantized"]
    said += [f"KL {whole.kl:.4f} with everything quantized"]
    return said + [
        f"{sum(unit.alone.kl for unit in units):.4f} is the sum of {len(units)} {kind} alone"
        for kind, units in _kinds(changes).items()
        if units
    ]


def _written(value: float | None) -> str:
    """Nine digits are enough to tell any two float32 numbers apart."""
    return "" if value is None else f"{value:.9g}"

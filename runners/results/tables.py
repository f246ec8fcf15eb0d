"""What a run or a sweep says at its end: the table, what went wrong, and where to look next."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from runners.results.metrics import status_counts

MARK = " †"


def results_table(rows: Sequence[dict[str, Any]]) -> Group:
    """One row a run, from its `metrics.json`, and what holds for all. Columns that would say the same are left out."""
    texts = list(dict.fromkeys(key for row in rows for key in row if key.startswith("ppl/")))
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = []
    if len({row["model"] for row in rows}) > 1:
        columns.append(("model", lambda row: row["model"]))
    columns.append(("method", lambda row: row["method"] + MARK * _damping_raised(row)))
    columns.append(("bits", lambda row: str(row.get("bits", ""))))
    if any(_setting(row) for row in rows):
        columns.append(("setting", _setting))
    columns.append(("bits/\nweight", lambda row: _number(row, "bits_per_weight", ".2f")))
    for text in texts:
        name = text.removeprefix("ppl/").replace("_", "_\n")
        columns.append((f"ppl\n{name}", lambda row, text=text: _number(row, text, ".2f")))
    for key in dict.fromkeys(key for row in rows for key in row if re.fullmatch("zero_shot/.+/acc", key)):
        name = key.split("/")[1].removesuffix("_openai").removeprefix("stdlib_").replace("_", "_\n")
        columns.append((f"acc %\n{name}", lambda row, key=key: _percent(row, key)))
    columns.append(("layer\nerror", lambda row: _number(row, "layers/mean_relative_error", ".2e")))
    columns.append(("seconds", lambda row: _number(row, "quantize/seconds", ".1f")))
    columns.append(("memory", lambda row: _number(row, _memory(row), ".2f", " GB")))
    if any(row["status"] != "done" for row in rows):
        columns.append(("status", lambda row: row["status"]))
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name, _ in columns:
        table.add_column(name, justify="left" if name in ("model", "method", "setting", "status") else "right")
    for row in rows:
        table.add_row(*(cell(row) for _, cell in columns), style=None if row["status"] == "done" else "red")
    return Group(table, Text("; ".join(_facts(rows)), style="dim"))


def cells_table(rows: Sequence[dict[str, Any]]) -> Group:
    """One row a cell: what it is and how far it has come; and how many have come how far."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for name in ("model", "method", "bits", "setting", "state", ""):
        table.add_column(name, justify="right" if name == "bits" else "left", no_wrap=name in ("method", "state"))
    for row in rows:
        status = row["status"]
        style = "red" if status == "failed" else "dim" if status == "missing" else None
        detail = "" if status in ("done", "missing") else str(row["error"])
        table.add_row(
            row["model"], row["method"], str(row.get("bits", "")), row["setting"], status, detail, style=style
        )
    return Group(table, Text(counts(rows)))


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """How many cells there are of every state: `3 done, 1 failed, 2 missing`."""
    return status_counts(row["status"] for row in rows) or "no cells"


def _number(row: dict[str, Any], key: str, form: str, unit: str = "") -> str:
    value = row.get(key)
    if value is None:
        return ""
    untouched = row["method"] == "fp16" and key.startswith(("quantize/", "layers/"))
    return "-" if untouched else f"{value:{form}}{unit}"


def _percent(row: dict[str, Any], key: str) -> str:
    return f"{100 * row[key]:.1f}" if key in row else ""


def _memory(row: dict[str, Any]) -> str:
    return "evaluate/peak_memory_gb" if row["method"] == "fp16" else "quantize/peak_memory_gb"


def _setting(row: dict[str, Any]) -> str:
    """What sets a run apart: from the others of its sweep, or from the default grid and order."""
    if "setting" in row:
        return row["setting"]
    group = f"group {row['group_size']}" if row.get("group_size") else ""
    words = [group, "symmetric" * bool(row.get("symmetric")), "mse" * (row.get("grid_range") == "mse")]
    words.append("act-order" * bool(row.get("act_order")))
    return " ".join(word for word in words if word)


def _facts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What holds for all rows and is needed to read them."""
    models = {f"{row['model']}, {row['parameters'] / 1e6:,.1f} M parameters" for row in rows if "parameters" in row}
    protocols = {
        f"{key.removeprefix('protocol/')}: {value}, {row['windows/' + key.removeprefix('protocol/')]} windows"
        for row in rows
        for key, value in row.items()
        if key.startswith("protocol/")
    }
    questions = {
        f"{name[1]}: {value} questions"
        for row in rows
        for key, value in row.items()
        if (name := re.fullmatch("zero_shot/(.+)/samples", key))
    }
    mark = (
        [f"{MARK.strip()} damping was raised in some layers, see layers.csv"] if any(map(_damping_raised, rows)) else []
    )
    skipped = dict.fromkeys(key.removeprefix("skipped/") for row in rows for key in row if key.startswith("skipped/"))
    missing = [f"not measured: {', '.join(skipped)} (why: skipped/ in metrics.json)"] if skipped else []
    return [*(sorted(models) if len(models) < 2 else []), *sorted(protocols), *sorted(questions), *mark, *missing]


def _damping_raised(row: dict[str, Any]) -> bool:
    return bool(row.get("warnings/damping_raised"))


def failure_text(row: dict[str, Any]) -> str:
    """Why a run did not end well, and where that is recorded."""
    what = f"{row['method']} {row['status']} during {row['stage']}: {row['error']}"
    return f"{what}\n(recorded in {row['folder']}/metrics.json)"


def next_steps(row: dict[str, Any]) -> str:
    """Where the results of a run lie, and what to try next."""
    tracked = f"\ntracked   {row['tracker']}" if row["tracker"] else ""
    return f"""
results   {row["folder"]}{tracked}

next      python run.py -m method=rtn,gptq,quantease bits=2,3,4
          python run.py method=gptq_quantease group_size=64
          python run.py model=opt-125m            (needs the model hub)
          python run.py --help"""

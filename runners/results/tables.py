"""The output of a run or a sweep at its end: tables, failures, and where to look next."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from runners.results import metrics
from runners.results.metrics import OWN_GRID, PER_CHANNEL, REFERENCE, Status, grid_words, method_words, status_counts
from runners.results.run_log import RUN_LOG

Run = Mapping[str, Any]  # the metrics of a run; of a cell that has not ended, its labels, status and error

ESTIMATES = ("time", "memory", "disk")  # of a cell that is still to be run, in words
BASIS = "basis"  # where they come from
RAISED_DAMPING = "†"
TRIES_AGAIN = "what memory ran out for, the same command tries again"
DEFAULT_GRIDS = ("", PER_CHANNEL, OWN_GRID)  # need no column


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and the text in it for a run."""

    heading: str
    text: Callable[[Run], str]
    justify: Literal["left", "right"] = "right"


def results_table(runs: Sequence[Run]) -> Group:
    """One row per run, and below the table what holds for all of them. Columns that would say the same are left out.

    The runs of a model are together, full precision first; else they stay in their order.
    """
    models = list(dict.fromkeys(run["model"] for run in runs))
    runs = sorted(runs, key=lambda run: (models.index(run["model"]), run["method"] != REFERENCE))
    columns = _columns(runs)
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    for column in columns:
        table.add_column(column.heading, justify=column.justify)
    for run in runs:
        style = None if run["status"] == Status.DONE else "red"
        table.add_row(*(column.text(run) for column in columns), style=style)
    return Group(table, Text("; ".join(_facts(runs)), style="dim"))


def cells_table(cells: Sequence[Run], notes: Sequence[str] = ()) -> Group:
    """One row per cell, with its status; and below the table how many cells have each status.

    Args:
        cells: those that have ESTIMATES, or one of them, show them.
        notes: lines that come between the table and the counts.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    estimates = [name for name in ESTIMATES if any(cell.get(name) for cell in cells)]
    names = ["model", "method", "bits", "setting", "state", *estimates, ""]
    for name in names:
        justify = "right" if name in ("bits", *ESTIMATES) else "left"
        table.add_column(name, justify=justify, no_wrap=name in ("method", "state", *ESTIMATES))
    for cell in cells:
        status = cell["status"]
        style = {Status.FAILED: "red", Status.MISSING: "dim"}.get(status)
        texts = {name: str(cell.get(name, "")) for name in names} | {"bits": _bits(cell), "state": status}
        detail = "" if status in (Status.DONE, Status.MISSING) else str(cell["error"])
        texts[""] = "; ".join(part for part in (detail, cell.get(metrics.TASKS_LEFT), cell.get(BASIS)) if part)
        table.add_row(*(texts[name] for name in names), style=style)
    lines = [Text(note) for note in notes] + ([Text("")] if notes else [])
    return Group(table, *lines, Text(cell_counts(cells)))


def cell_counts(cells: Sequence[Run]) -> str:
    """How many cells have each status: `3 done, 1 failed, 2 missing`."""
    return status_counts(cell["status"] for cell in cells) or "no cells"


def failure_text(run: Run) -> str:
    """Why a run did not end well, and where that is recorded."""
    what = f"{run['method']} {run['status']} during {run['stage']}: {run['error']}"
    return f"{what}\n(recorded in {run['folder']}/{metrics.METRICS}; details: {run['folder']}/{RUN_LOG})"


def next_steps(run: Run, words: Sequence[str]) -> str:
    """Where the results of a run are, and what to try next.

    Args:
        words: the settings that the run was asked for, as they were typed: the next command has them, too.
    """
    tracked = f"\ntracked   {run['tracker']}" if run["tracker"] else ""
    places = [word for word in words if _sets([word], "results") or _sets([word], "study")]
    hub = [f"{command_text(places, 'model=opt-125m')}            (needs the model hub)"]
    free = not _sets(words, "grid")  # a grid that was chosen says what bits and group_size are
    others = [
        command_text(words, "method=rtn,gptq,quantease", *["bits=2,3,4"] * free, sweep=True),
        command_text(words, "method=gptq_quantease", *["group_size=64"] * free),
    ]
    steps = [
        *(others if run.get("method") != metrics.STORED else []),  # what was quantized elsewhere is not quantized again
        *([] if _sets(words, "model") else hub),
        f"python -m analysis {shlex.quote(str(Path(run['folder']).parents[1]))}",
        "python run.py --help",
    ]
    return f"\nresults   {run['folder']}{tracked}\n\nnext      " + "\n          ".join(steps)


def command_text(words: Sequence[str], *changes: str, sweep: bool = False) -> str:
    """A command line for the shell: the settings that were typed, but for those that change.

    Left out are a group's settings where another option of it is chosen, and `force`, which would repeat what is done.
    """
    changed = [change.partition("=")[0] for change in changes]
    kept = [word for word in words if not any(_sets([word], name) for name in (*changed, "force"))]
    return " ".join(["python run.py", *(["-m"] if sweep else []), *changes, *map(shlex.quote, kept)])


def _sets(words: Sequence[str], name: str) -> bool:
    """Whether any of the words is a setting of that name, or one within a group of that name."""
    return any(re.match(rf"\+*{re.escape(name)}[.=]", word) for word in words)


def _columns(runs: Sequence[Run]) -> list[Column]:
    several_models = len({run["model"] for run in runs}) > 1
    any_setting = any(_setting(run) not in DEFAULT_GRIDS for run in runs)
    any_not_done = any(run["status"] != Status.DONE for run in runs)
    return [
        *([Column("model", lambda run: run["model"], "left")] if several_models else []),
        Column("method", _method, "left"),
        Column("bits", _bits),
        *([Column("setting", _setting, "left")] if any_setting else []),
        Column("bits/\nweight", _stored_bits),
        *(_number(f"ppl\n{_narrow(text)}", metrics.ppl(text), ".2f") for text in _names(runs, "ppl")),
        *(_accuracy(task) for task in _zero_shot_tasks(runs, "acc")),
        _number("layer\nerror", metrics.RELATIVE_ERROR, ".2e", of_quantization=True),
        _number("seconds", metrics.QUANTIZE_SECONDS, ".1f", of_quantization=True),
        Column(metrics.CALIBRATION_SECONDS_WORDS.replace(" c", "\nc"), _calibration_seconds),
        Column("memory", _memory),
        *([Column("status", lambda run: run["status"], "left")] if any_not_done else []),
    ]


def _number(heading: str, key: str, form: str, *, of_quantization: bool = False) -> Column:
    """A column of one metric; empty where a run lacks it. `of_quantization`: without meaning for the unquantized model."""

    def text(run: Run) -> str:
        if run.get(key) is None:
            return ""
        return "-" if of_quantization and run["method"] == REFERENCE else f"{run[key]:{form}}"

    return Column(heading, text)


def _accuracy(task: str) -> Column:
    key = metrics.zero_shot(task, "acc")
    name = task.removesuffix("_openai").removeprefix("stdlib_")
    return Column(f"acc %\n{_narrow(name)}", lambda run: f"{100 * run[key]:.1f}" if key in run else "")


def _method(run: Run) -> str:
    return method_words(run) + f" {RAISED_DAMPING}" * _damping_was_raised(run)


def _bits(run: Run) -> str:
    return metrics.bits_of(run)


def _stored_bits(run: Run) -> str:
    if (stored := run.get(metrics.BITS_PER_WEIGHT)) is None:
        return ""
    return (
        f"{metrics.FAR_MORE_BITS} " * metrics.stores_far_more(run) + f"{stored:.2f}"
    )  # in front: the digits stay aligned


def _setting(run: Run) -> str:
    """What distinguishes a run: from the others of its sweep if that is known, else by its grid and order of columns."""
    return run["setting"] if "setting" in run else grid_words(run)


def _calibration_seconds(run: Run) -> str:
    seconds = metrics.calibration_seconds(run)
    return "" if seconds is None else f"{seconds:.1f}"


def _memory(run: Run) -> str:
    """What a machine must have to do the whole run: evaluation may take more than quantization, and the other way round."""
    peak = metrics.peak_memory_gb(run)
    return "" if peak is None else f"{peak:.2f} GB"


def _narrow(name: str) -> str:
    """A name in several lines, so that many columns fit into a terminal."""
    return name.replace("_", "_\n")


def _names(runs: Sequence[Run], family: str) -> list[str]:
    """The names in a family's keys of all runs, each once, in order."""
    return list(dict.fromkeys(name for run in runs for name in metrics.names(run, family)))


def _zero_shot_tasks(runs: Sequence[Run], metric: str) -> list[str]:
    """The tasks for which any run has the metric, each once, in order."""
    parts = [metrics.zero_shot_parts(key) for run in runs for key in run]
    return list(dict.fromkeys(part[0] for part in parts if part is not None and part[1] == metric))


def _facts(runs: Sequence[Run]) -> list[str]:
    """What holds for all runs and is needed to read their numbers: model, protocols, samples, and what is missing."""
    return [
        *_model(runs),
        *_protocols(runs),
        *_questions(runs),
        *_damping(runs),
        *_far_more_bits(runs),
        *_fallbacks(runs),
        *dict.fromkeys(note for run in runs if (note := metrics.stored_note(run))),
        *_not_measured(runs),
        *_warnings(runs),
        *sorted({note for run in runs if (note := run.get(metrics.CALIBRATION_NOTE))}),
    ]


def _model(runs: Sequence[Run]) -> list[str]:
    """Nothing where the runs are of several models: those have a column."""
    models = {f"{run['model']}, {run['parameters'] / 1e6:,.1f} M parameters" for run in runs if "parameters" in run}
    return [*(models if len(models) == 1 else []), *_model_notes(runs)]


def _model_notes(runs: Sequence[Run]) -> list[str]:
    return sorted({f"{run['model']}: {note}" for run in runs if (note := run.get(metrics.MODEL_NOTE))})


def _fallbacks(runs: Sequence[Run]) -> list[str]:
    notes = [(run["method"], metrics.fallback_note(run)) for run in runs]
    return list(dict.fromkeys(f"{method}: {note}" for method, note in notes if note))


def _protocols(runs: Sequence[Run]) -> list[str]:
    return sorted(
        {
            f"{text}: {run[metrics.protocol(text)]}, {run[metrics.windows(text)]} windows"
            + ", BOS in the first" * (run.get(metrics.bos(text)) == "text")  # `window` is part of the protocol's name
            for run in runs
            for text in metrics.names(run, "protocol")
        }
    )


def _questions(runs: Sequence[Run]) -> list[str]:
    counts = {task: metrics.zero_shot(task, "samples") for task in _zero_shot_tasks(runs, "samples")}
    return sorted({f"{task}: {run[key]} questions" for task, key in counts.items() for run in runs if key in run})


def _damping(runs: Sequence[Run]) -> list[str]:
    raised = any(_damping_was_raised(run) for run in runs)
    return [f"{RAISED_DAMPING} damping was raised in some layers, see layers.csv"] if raised else []


def _far_more_bits(runs: Sequence[Run]) -> list[str]:
    if not any(metrics.stores_far_more(run) for run in runs):
        return []
    return [f"{metrics.FAR_MORE_BITS} {metrics.FAR_MORE_NOTE}"]


def _not_measured(runs: Sequence[Run]) -> list[str]:
    skipped = _names(runs, "skipped")
    words = [f"not measured: {', '.join(skipped)} (why: skipped/ in metrics.json)"] if skipped else []
    return words + [TRIES_AGAIN] * any(metrics.tasks_without_memory(run) for run in runs)


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What makes the numbers doubtful: no BOS where the model needs it, differences in KL below the noise floor."""
    found = [warning for run in runs if (warning := metrics.bos_warning(run))]
    floors = {
        f"noise floor of the KL on {text}: {metrics.floor_words(run[key])}; a smaller difference is none"
        for run in runs
        for text in metrics.names(run, "ppl")
        if (key := metrics.agreement(text, metrics.KL_FLOOR)) in run
    }
    return [*dict.fromkeys(found), *sorted(floors)]


def _damping_was_raised(run: Run) -> bool:
    return bool(run.get(metrics.warning("damping_raised")))

"""`python -m runners.status study=tiny`: how far a study has come, on any machine that sees its folder."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from runners.arguments import start
from runners.console import console
from runners.errors import InputError, known_names
from runners.project import results_folder
from runners.results.metrics import (
    CALIBRATION_BOS,
    COMMAND,
    METRICS,
    OPEN,
    REFERENCE,
    TASKS_LEFT,
    Reason,
    Status,
    bits_words,
    model_words,
)
from runners.results.progress import PROGRESS
from runners.results.studies import chosen_study
from runners.results.tables import cell_counts, cells_table, command_text
from runners.sweeps.cells import read_status, registered_cells
from runners.sweeps.time_left import time_left

NAMED = 4  # methods that are named with each place of BOS; the others are counted


def main(
    study: Annotated[str | None, "name of the study (default: the one that was run last)"] = None,
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
) -> None:
    """Show which cells of a study are done, running, failed or missing, and how long the rest will take."""
    results = results or results_folder()
    study = chosen_study(study, results)
    rows = cells(results / study)
    if not_done := [row for row in rows if row["status"] != Status.DONE or TASKS_LEFT in row]:
        console.print(cells_table(not_done), soft_wrap=False)
        for row in not_done:
            if row.get("reason") == Reason.DAMAGED:  # on a line of its own: the table breaks the file's name
                console.print(row["error"], highlight=False, soft_wrap=True)
    for line in [*bos_words(rows), f"{results / study}: {cell_counts(rows)}; {time_left(rows)}"]:
        console.print(line, highlight=False, soft_wrap=True)
    if commands := next_commands(rows):
        console.print("\nnext      " + "\n          ".join(commands), highlight=False, soft_wrap=True)


def cells(study: Path) -> list[dict[str, Any]]:
    """One row per cell: first the cells that sweeps of the study have registered, then all others that have a run.

    Raises:
        InputError: there is no such study, or its list of cells is damaged.
    """
    if not study.is_dir():
        raise InputError(_no_study(study))
    listed = registered_cells(study)
    files = [file for name in (METRICS, PROGRESS) for file in study.glob(f"*/*/{name}")]
    found = {file.parent.relative_to(study).as_posix() for file in files}
    rows = [{"setting": "", **listed[name]} | read_status(study / name) for name in listed]
    rows += [_from_name(name) | read_status(study / name) for name in sorted(found - listed.keys())]
    return [row | {"model": model} for row, model in zip(rows, model_words(rows), strict=True)]


def next_commands(rows: list[dict[str, Any]]) -> list[str]:
    """The commands that go on with what is left or has failed, as they were typed; of older lists of cells nobody knows."""
    failed: dict[tuple[str, ...], bool] = {}  # by the words of a command, whether a cell of it has failed
    for row in rows:
        has_failed = row["status"] == Status.FAILED and row.get("reason") != Reason.DAMAGED
        if COMMAND in row and (has_failed or row["status"] in OPEN or TASKS_LEFT in row):
            command = tuple(row[COMMAND])
            failed[command] = failed.get(command, False) or has_failed
    return [_command(list(words), has_failed) for words, has_failed in failed.items()]


def _command(words: list[str], has_failed: bool) -> str:
    sweep = words[:1] == ["-m"]  # a single run runs again what has failed without further words
    again = ["retry_failed=true"] * (has_failed and sweep)
    return command_text(words[1:] if sweep else words, *again, sweep=sweep)


def bos_words(rows: list[dict[str, Any]]) -> list[str]:
    """For every model whose runs were calibrated with BOS at different places: which runs had it where."""
    found: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        if CALIBRATION_BOS in row and row["method"] != REFERENCE:
            names = found.setdefault(row["model"], {}).setdefault(row[CALIBRATION_BOS], {})
            names[f"{row['method']} {bits_words(row['bits'])}"] = None
    return [
        f"{model}: calibration.bos differs: {'; '.join(f'{bos} in {_some(names)}' for bos, names in places.items())}"
        for model, places in found.items()
        if len(places) > 1
    ]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _from_name(name: str) -> dict[str, Any]:
    """The labels of a cell that no sweep has registered, from `<model>/<method>-<bits>b-<digest>`."""
    model, _, run = name.partition("/")
    return {"method": run.split("-")[0], "model": model, "setting": ""}


def _no_study(study: Path) -> str:
    studies = sorted(folder.name for folder in study.parent.glob("*/") if folder.is_dir())
    return f"there is no study {study.absolute()}: {known_names(study.name, studies) if studies else 'nothing has run yet'}"


if __name__ == "__main__":
    start(main)

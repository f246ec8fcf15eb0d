"""`python -m runners.status study=tiny`: how far a study has come, on any machine that sees its folder."""

import time
from pathlib import Path
from typing import Annotated, Any

from runners.arguments import start
from runners.console import console, duration
from runners.errors import InputError, known_names
from runners.project import results_folder
from runners.results.metrics import EVALUATE_SECONDS, METRICS, OPEN, QUANTIZE_SECONDS, Reason, Status, model_words
from runners.results.progress import PROGRESS
from runners.results.studies import chosen_study
from runners.results.tables import cell_counts, cells_table
from runners.sweeps.cells import read_status, registered_cells


def main(
    study: Annotated[str | None, "name of the study (default: the one that was run last)"] = None,
    results: Annotated[Path | None, "folder of all studies (default: results/ of the project)"] = None,
) -> None:
    """Show which cells of a study are done, running, failed or missing, and how long the rest will take."""
    results = results or results_folder()
    study = chosen_study(study, results)
    rows = cells(results / study)
    if not_done := [row for row in rows if row["status"] != Status.DONE]:
        console.print(cells_table(not_done), soft_wrap=False)
        for row in not_done:
            if row.get("reason") == Reason.DAMAGED:  # on a line of its own: the table breaks the file's name
                console.print(row["error"], highlight=False, soft_wrap=True)
    console.print(f"{results / study}: {cell_counts(rows)}; {time_left(rows)}", highlight=False, soft_wrap=True)


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


def time_left(rows: list[dict[str, Any]]) -> str:
    """The time that the open cells will take, as a sentence.

    A cell is taken to last as long as the mean done cell of its method; where no cell of that method is done, as the mean of
    all done cells.
    """
    waiting = [row for row in rows if row["status"] in (*OPEN, Status.RUNNING)]
    if not waiting:
        return "nothing is left to do"
    done = [(row["method"], seconds(row)) for row in rows if row["status"] == Status.DONE]
    if not done:
        return "time left: unknown until a cell is done"
    left = 0.0
    for row in waiting:
        similar = [taken for method, taken in done if method == row["method"]] or [taken for _, taken in done]
        left += max(0.0, sum(similar) / len(similar) - _elapsed(row))
    workers = max(1, sum(row["status"] == Status.RUNNING for row in rows))
    return f"about {duration(left / workers)} left with {workers} worker{'s' * (workers > 1)}"


def seconds(row: dict[str, Any]) -> float:
    """The seconds that a done cell took for quantization and evaluation."""
    return row.get(QUANTIZE_SECONDS, 0.0) + row.get(EVALUATE_SECONDS, 0.0)


def _elapsed(row: dict[str, Any]) -> float:
    """Seconds since a running cell started; 0 for a cell that waits."""
    progress = row.get("progress")
    return time.time() - progress["started"] if progress else 0.0


def _from_name(name: str) -> dict[str, Any]:
    """The labels of a cell that no sweep has registered, from `<model>/<method>-<bits>b-<digest>`."""
    model, _, run = name.partition("/")
    return {"method": run.split("-")[0], "model": model, "setting": ""}


def _no_study(study: Path) -> str:
    studies = sorted(folder.name for folder in study.parent.glob("*/") if folder.is_dir())
    return f"there is no study {study.absolute()}: {known_names(study.name, studies) if studies else 'nothing has run yet'}"


if __name__ == "__main__":
    start(main)

"""How far a study has come, read from its folder, on any machine that sees it: python -m runners.status study=tiny"""

import difflib
import sys
import time
from pathlib import Path
from typing import Any

from runners.console import console
from runners.errors import InputError
from runners.results.progress import PROGRESS
from runners.results.run_folder import METRICS
from runners.results.tables import cells_table, counts
from runners.sweeps.cells import registered, state

DEFAULTS = {"study": "runs", "results": "results"}


def main(arguments: list[str]) -> None:
    """Print what is done, running, failed and missing, and how long the rest will take."""
    try:
        options = _parse(arguments)
        study = Path(options["results"]) / options["study"]
        rows = cells(study)
    except InputError as error:
        raise SystemExit(f"error: {error}") from None
    if open_ := [row for row in rows if row["status"] != "done"]:
        console.print(cells_table(open_), soft_wrap=False)
    console.print(f"{study}: {counts(rows)}; {time_left(rows)}", highlight=False, soft_wrap=True)


def cells(study: Path) -> list[dict[str, Any]]:
    """One row a cell: of those that the study's sweeps have listed, and of what else has run there.

    Raises:
        InputError: there is no such study, or its list is damaged.
    """
    if not study.is_dir():
        raise InputError(_no_study(study))
    listed = registered(study)
    found = {
        file.parent.relative_to(study).as_posix() for name in (METRICS, PROGRESS) for file in study.glob(f"*/*/{name}")
    }
    rows = [{"setting": "", **listed[name]} | state(study / name) for name in listed]
    return rows + [_by_name(name) | state(study / name) for name in sorted(found - listed.keys())]


def time_left(rows: list[dict[str, Any]]) -> str:
    """In a sentence, from the mean seconds of done cells of the same method, or of all where none of that is done."""
    waiting = [row for row in rows if row["status"] in ("missing", "interrupted", "unfinished", "running")]
    if not waiting:
        return "nothing is left to do"
    taken = [(row["method"], seconds(row)) for row in rows if row["status"] == "done"]
    if not taken:
        return "time left: unknown until a cell is done"
    left = 0.0
    for row in waiting:
        like = [each for method, each in taken if method == row["method"]] or [each for _, each in taken]
        left += max(0.0, sum(like) / len(like) - _gone(row))
    workers = max(1, sum(row["status"] == "running" for row in rows))
    return f"about {duration(left / workers)} left with {workers} worker{'s' * (workers > 1)}"


def seconds(row: dict[str, Any]) -> float:
    """What a done cell took: quantization and evaluation."""
    return row.get("quantize/seconds", 0.0) + row.get("evaluate/seconds", 0.0)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _gone(row: dict[str, Any]) -> float:
    progress = row.get("progress")
    return time.time() - progress["started"] if progress else 0.0


def _by_name(name: str) -> dict[str, Any]:
    model, _, run = name.partition("/")
    return {"method": run.split("-")[0], "model": model, "setting": ""}


def _parse(arguments: list[str]) -> dict[str, str]:
    options = dict(DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in DEFAULTS or not equals or not value:
            raise InputError(f"{argument} is not understood: python -m runners.status study=NAME [results=FOLDER]")
        options[key] = value
    return options


def _no_study(study: Path) -> str:
    there = sorted(folder.name for folder in study.parent.glob("*/") if folder.is_dir())
    close = difflib.get_close_matches(study.name, there, n=1)
    hint = f"did you mean {close[0]}? There are" if close else "there are"
    return f"there is no study {study}: " + (f"{hint} {', '.join(there)}" if there else "nothing has run yet")


if __name__ == "__main__":
    main(sys.argv[1:])

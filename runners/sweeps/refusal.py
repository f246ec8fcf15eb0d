"""Refuse a command of which a cell cannot work, before the first of its cells is started or written down anywhere."""

from collections.abc import Sequence
from pathlib import Path

from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.run_folder import RunFolder
from runners.run.input_check import input_problems
from runners.sweeps.cells import cell_names

NAMED = 4  # cells that are named with each problem; the others are counted


def refuse_impossible(cells: Sequence[Settings], is_run_here: bool) -> None:
    """Check the inputs of every cell that is still to be run, and of its reference.

    Args:
        is_run_here: False where the cells run on other machines, or are only listed.

    Raises:
        InputError: with all that is wrong, and the cells that it is wrong with.
    """
    unique = {cell.folder: cell for cell in cells}
    found: dict[str, list[Path]] = {}  # by problem the cells that have it
    for folder, cell in unique.items():
        for problem in _problems(cell, is_run_here):
            found.setdefault(problem, []).append(folder)
    if not found:
        return
    if all(len(theirs) == len(unique) for theirs in found.values()):
        raise InputError("\n".join(found))
    names = cell_names(list(unique.values()))
    count = len({folder for theirs in found.values() for folder in theirs})
    lines = [f"{count} of {len(unique)} cells cannot work, so none was started:"]
    lines += [f"  {_words([names[folder] for folder in theirs])}: {problem}" for problem, theirs in found.items()]
    raise InputError("\n".join(lines))


def _words(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return "; ".join(names[:NAMED]) + more


def _problems(cell: Settings, is_run_here: bool) -> list[str]:
    """What is wrong with the inputs of a cell, or of the reference that it still needs; nothing that is done needs any."""
    runs = [cell, cell.reference()] if cell.run.is_compared else [cell]
    return next((problems for run in runs if _is_open(run) and (problems := input_problems(run, is_run_here))), [])


def _is_open(run: Settings) -> bool:
    return RunFolder(run.folder).is_to_run(run.execution.force, run.execution.retry_failed)

"""Refuse a command of which a cell cannot work, before the first of its cells is started or written down anywhere."""

from collections.abc import Sequence

from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.run_folder import RunFolder
from runners.run.input_check import input_problem
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
    found = {folder: problem for folder, cell in unique.items() if (problem := _problem(cell, is_run_here))}
    if not found:
        return
    names, problems = cell_names(list(unique.values())), list(dict.fromkeys(found.values()))
    if len(found) == len(unique) and len(problems) == 1:
        raise InputError(problems[0])
    lines = [f"{len(found)} of {len(unique)} cells cannot work, so none was started:"]
    for problem in problems:
        theirs = [names[folder] for folder in found if found[folder] == problem]
        more = f" and {len(theirs) - NAMED} more" if len(theirs) > NAMED else ""
        lines.append(f"  {', '.join(theirs[:NAMED])}{more}: {problem}")
    raise InputError("\n".join(lines))


def _problem(cell: Settings, is_run_here: bool) -> str | None:
    """What is wrong with the inputs of a cell, or of the reference that it still needs; nothing that is done needs any."""
    runs = [cell, cell.reference()] if cell.run.quantizes else [cell]
    return next((problem for run in runs if _is_open(run) and (problem := input_problem(run, is_run_here))), None)


def _is_open(run: Settings) -> bool:
    try:
        return RunFolder(run.folder).metrics_to_keep(run.execution.force, run.execution.retry_failed) is None
    except InputError:  # damaged: the run itself says so
        return False

"""Which study was run last, so that what is asked next needs no name. Imports no torch, as `analysis` reads it, too.

Only what reads or sends results goes by it; a run is always told its study, or is of the study `runs`.
"""

from pathlib import Path

from runners.console import console
from runners.errors import InputError
from runners.names import check_name

LAST = ".last_study"  # in the folder of all studies: the name of one of them
COMMITTED = "tiny"  # comes with the project


def remember(study: Path) -> None:
    """Note the study of a run that begins. Where nothing can be noted, nothing is: no run may fail of that."""
    try:
        study.parent.mkdir(parents=True, exist_ok=True)
        (study.parent / LAST).write_text(study.name, encoding="utf-8")
    except OSError:
        pass


def chosen_study(study: str | None, results: Path) -> str:
    """The name of the study that is asked for; without one that of the study that was run last, which is then printed.

    `study: night (the last that was run in /home/me/results)`

    Args:
        results: the folder of all studies.

    Raises:
        InputError: the name is none, or there is no study to choose.
    """
    if study is not None:
        return check_name("study", study)
    if (last := _remembered(results)) is not None:
        name, why = last, f"the last that was run in {results.absolute()}"
    elif (results / COMMITTED).is_dir():
        name, why = COMMITTED, f"nothing was run in {results.absolute()} yet"
    else:
        there = ", ".join(sorted(folder.name for folder in results.glob("*/") if folder.is_dir())) or "none"
        raise InputError(f"no study was run in {results.absolute()} yet: name one, of which there are {there}")
    console.print(f"study: {name} ({why})", highlight=False, soft_wrap=True)
    return name


def _remembered(results: Path) -> str | None:
    """The name in the note, unless the note or its study is gone or damaged."""
    try:
        name = check_name("study", (results / LAST).read_text(encoding="utf-8").strip())
    except (OSError, ValueError, InputError):
        return None
    return name if (results / name).is_dir() else None

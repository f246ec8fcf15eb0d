"""What trackio has kept of a study's runs that are gone, or were made again."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from runners.prune.removable import Removable, delete, size_of
from runners.prune.runs import run_folders
from runners.results.run_folder import RunFolder
from runners.tracking.store import Project


def has_project(study: Path) -> bool:
    """Whether trackio has kept runs of a study, which may be gone itself."""
    return Project(study).database.is_file()


def tracked_leftovers(study: Path, gone: Collection[Path]) -> Iterator[Removable]:
    """Of a study without runs all of its project in trackio's store, else what is of no run.

    Args:
        gone: the folders of runs that go now.
    """
    project = Project(study)
    if not project.database.is_file():
        return
    if not set(run_folders(study)) - set(gone):
        yield _project(project, study)
        return
    folders = _folders(study)
    for name in project.runs():
        digest = _digest(name)
        if digest is not None and folders.get(digest) in (None, *gone):
            yield _run(project, study, name, digest)
    figures = project.unused_figures()
    if figures and not _any_is_running(study):  # which may be about to mention it
        yield _figures(project, study, figures)


def _project(project: Project, study: Path) -> Removable:
    def remove() -> bool:
        return not run_folders(study) and all([delete(path) for path in project.paths])

    return Removable(project.database, "trackio's runs of a study that has none", size_of(project.paths), remove)


def _run(project: Project, study: Path, name: str, digest: str) -> Removable:
    media = project.media / name

    def remove() -> bool:
        if digest in _folders(study):
            return False
        project.forget({name})
        return delete(media)

    why = f"trackio's record of a run that is gone, {name}"
    return Removable(project.database, why, size_of([media]), remove)


def _figures(project: Project, study: Path, figures: list[Path]) -> Removable:
    def remove() -> bool:
        return not _any_is_running(study) and all([delete(figure) for figure in figures])

    return Removable(project.media, "trackio's figures of runs that were made again", size_of(figures), remove)


def _digest(name: str) -> str | None:
    """The digest at the end of a run's name in a tracker; None where somebody else has named it."""
    found = re.search(r" · ([0-9a-f]{10})$", name)
    return found[1] if found else None


def _folders(study: Path) -> dict[str, Path]:
    """The folders of a study's runs by their digests, also of those that have just begun."""
    return {folder.name.rpartition("-")[2]: folder for folder in study.glob("*/*-*") if folder.is_dir()}


def _any_is_running(study: Path) -> bool:
    return any(RunFolder(folder).is_running() for folder in run_folders(study))

"""Runs that can go, and what no run needs any more."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

from runners.prune.removable import Removable, delete, size_of, unused
from runners.results.metrics import ENDED, METRICS, Reason, Status
from runners.results.progress import PROGRESS
from runners.results.run_folder import RunFolder
from runners.sweeps.cells import read_status

Which = Literal["failures", "not_done", "all", "none"]
KEPT: dict[str, set[Status]] = {  # the states of runs that stay; running ones always do
    "failures": set(Status) - {Status.FAILED},
    "not_done": {Status.DONE, Status.UNSUPPORTED},
    "all": set(),
}


def removable_runs(study: Path, which: Which) -> Iterator[Removable]:
    """The runs of a study that are in one of the states that are asked for; none that a process works on."""
    if which == "none":
        return
    for folder in run_folders(study):
        row = read_status(folder)
        status, is_damaged = Status(row["status"]), row.get("reason") == Reason.DAMAGED
        if is_damaged and which != "all":  # it is no failure: most of it may be sound, or be restored
            continue
        if status != Status.RUNNING and status not in KEPT[which] and not _is_linked(folder):
            yield _run(folder, "damaged run" if is_damaged else f"{status} run")


def run_folders(study: Path) -> list[Path]:
    """The folders of all runs of a study that have left anything."""
    return sorted({file.parent for name in (METRICS, PROGRESS) for file in study.glob(f"*/*/{name}")})


def leftovers(study: Path, gone: Collection[Path]) -> Iterator[Removable]:
    """What no run needs: temporary files of ended runs, but those `gone`, and offline runs of W&B that were sent."""
    for partial in sorted(study.glob("*/*/**/*.partial")):
        folder = study.joinpath(*partial.relative_to(study).parts[:2])
        if folder not in gone and not _is_linked(folder) and read_status(folder)["status"] in ENDED:
            yield unused(partial, "temporary file of a process that was killed")
    for marker in sorted((study / "wandb").glob("offline-run-*/*.wandb.synced")):
        yield unused(marker.parent, "sent to W&B")


def _run(folder: Path, why: str) -> Removable:
    """A run; one that a process has taken up before it is removed is left to that process."""

    def remove() -> bool:
        with RunFolder(folder).lock(wait=False) as is_mine:
            return is_mine and delete(folder)

    return Removable(folder, why, size_of([folder]), remove)


def _is_linked(folder: Path) -> bool:
    """Whether the run is in truth somewhere else, where others may need it."""
    return folder.is_symlink() or folder.parent.is_symlink()

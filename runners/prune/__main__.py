"""`python -m runners.prune study=NAME`: what of a study can go, and how large it is; `delete=true` removes it.

Without `delete=true` nothing is touched. A run that a process works on stays; so do offline runs of W&B that were not sent.
"""

import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from runners.arguments import start
from runners.console import console
from runners.errors import InputError
from runners.names import check_name
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


@dataclass(frozen=True)
class Removable:
    """A folder or file that can go, and why."""

    path: Path
    why: str
    is_run: bool = False

    @property
    def size(self) -> int:
        """In bytes."""
        files = [self.path, *self.path.rglob("*")]
        return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())

    def remove(self) -> bool:
        """Whether it is gone; a run that a process has taken up in the meantime is left to it.

        Raises:
            InputError: the file system refuses.
        """
        try:
            if self.is_run:
                with RunFolder(self.path).lock(wait=False) as is_mine:
                    if is_mine:
                        shutil.rmtree(self.path)
                    return is_mine
            shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
            return True
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be removed ({error.strerror}): what was listed before it is gone"
            ) from None


def main(
    study: Annotated[str, "name of the study"],
    results: Annotated[Path, "folder of all studies"] = Path("results"),
    runs: Annotated[
        Which, "failures; not_done, also those that could go on; all, also damaged ones; none"
    ] = "failures",
    cache: Annotated[bool, "also what all studies share in the folder cache; it is computed again when needed"] = False,
    delete: Annotated[bool, "remove what is listed"] = False,
) -> None:
    """List what of a study can go, with its size; with delete=true, remove it."""
    folder = results / check_name("study", study)
    if not folder.is_dir():
        raise InputError(f"there is no study {folder.absolute()}: set study=NAME, and results=PATH if it is elsewhere")
    found = list(removable_runs(folder, runs))
    found += leftovers(folder, {each.path for each in found})
    if cache and (results / "cache").is_dir():
        found.append(Removable(results / "cache", "shared by runs"))
    sizes = [each.size for each in found]
    left = 0
    for each, size in zip(found, sizes, strict=True):
        is_gone = each.remove() if delete else True
        left += 0 if is_gone else 1
        why = each.why if is_gone else "kept: a process works on it"
        console.print(f"{size / 1e6:10.1f} MB  {each.path}  ({why})", highlight=False, soft_wrap=True)
    what = f"{len(found) - left} of {len(found)} removed" if delete else f"{len(found)} can go"
    console.print(f"{what}, {sum(sizes) / 1e6:.1f} MB" + "; delete=true removes them" * (bool(found) and not delete))


def removable_runs(study: Path, which: Which) -> Iterator[Removable]:
    """The runs of a study that are in one of the states that are asked for; none that a process works on."""
    if which == "none":
        return
    found = {file.parent for name in (METRICS, PROGRESS) for file in study.glob(f"*/*/{name}")}
    for folder in sorted(found):
        row = read_status(folder)
        status, is_damaged = Status(row["status"]), row.get("reason") == Reason.DAMAGED
        if is_damaged and which != "all":  # it is no failure: most of it may be sound, or be restored
            continue
        if status != Status.RUNNING and status not in KEPT[which] and not _is_linked(folder):
            yield Removable(folder, "damaged run" if is_damaged else f"{status} run", is_run=True)


def leftovers(study: Path, gone: Collection[Path]) -> Iterator[Removable]:
    """What no run needs: temporary files of ended runs, but those `gone`, and offline runs of W&B that were sent."""
    for partial in sorted(study.glob("*/*/**/*.partial")):
        folder = study.joinpath(*partial.relative_to(study).parts[:2])
        if folder not in gone and not _is_linked(folder) and read_status(folder)["status"] in ENDED:
            yield Removable(partial, "temporary file of a process that was killed")
    for marker in sorted((study / "wandb").glob("offline-run-*/*.wandb.synced")):
        yield Removable(marker.parent, "sent to W&B")


def _is_linked(folder: Path) -> bool:
    """Whether the run is in truth somewhere else, where others may need it."""
    return folder.is_symlink() or folder.parent.is_symlink()


if __name__ == "__main__":
    start(main)

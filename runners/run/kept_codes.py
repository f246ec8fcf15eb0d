"""Codes that outlive their run: another evaluation of the same quantization takes them over and only measures.

Runs with one `Settings.quantization` differ in nothing but what is measured. Their finished blocks have the same identity,
so those of one run are valid in the folder of another. They are linked, not copied, where the file system can: each run has
its own, and the disk holds them once.

The codes of runs that are done stay while all that `keep_checkpoint=auto` keeps is within `checkpoints_gb`; the oldest go
first. A run of `keep_checkpoint=always` counts for nothing in that, and nobody deletes its codes.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runners.config.settings import Settings
from runners.quantization.finished_blocks import FOLDER, IDENTITY, delete_finished_blocks
from runners.results.metrics import METRICS, Status, tasks_without_memory
from runners.results.progress import Progress, read_progress, remove_progress
from runners.results.run_folder import RunFolder
from runners.storage.locks import file_lock

log = logging.getLogger(__name__)

MAY_GO = "kept-by-auto"  # a file in the folder of finished blocks that makes room when room is needed
CLEARING = "clear"  # the stage in which the metrics are written and the finished blocks deleted
LOCKS = ".quantizing"  # in the folder of all studies: one lock per quantization


@contextmanager
def alone_with(settings: Settings) -> Iterator[None]:
    """Hold the quantization: of several runs that would make the same codes at once, one does, and the others wait for it.

    Raises:
        InputError: the file system has no locks.
    """
    file = Path(settings.execution.results) / LOCKS / settings.quantization
    file.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(file, 0) as is_mine:
        if is_mine:
            yield
            return
    log.info("waiting for another run that makes the same codes (quantization %s)", settings.quantization)
    with file_lock(file, -1):
        yield


def take_over(settings: Settings, identity: dict[str, Any]) -> str | None:
    """Bring finished blocks of another run of the same quantization into the folder of this one, unless it has some.

    Args:
        identity: what the blocks must depend on (`resume_identity`).

    Returns:
        The folder of the other run, seen from that of all studies; None: there is none.
    """
    mine, results = settings.folder / FOLDER, Path(settings.execution.results)
    if (mine / IDENTITY).exists() and any(mine.glob("block-*.json")):
        return None
    run = f"{settings.run.method.name}-{settings.run.bits}b-*"
    found = [file.parent for file in results.glob(f"*/*/{run}/{FOLDER}/{IDENTITY}") if _has_identity(file, identity)]
    most = max(found, key=lambda folder: (len(list(folder.glob("block-*.json"))), str(folder)), default=None)
    if most is None or not any(most.glob("block-*.json")):
        return None
    delete_finished_blocks(settings.folder)  # an identity without a block
    mine.mkdir(parents=True)
    # Tensors before manifests, as they are written; the identity, without which no block counts, at last.
    order = [*sorted(most.glob("block-*.safetensors")), *sorted(most.glob("block-*.json")), most / IDENTITY]
    with suppress(FileNotFoundError):  # it makes room at this moment: what has come over is a beginning, or nothing
        for file in order:
            _link(file, mine / file.name)
    return most.parent.relative_to(results).as_posix()


def keep(settings: Settings) -> bool:
    """Decide about the codes of a run that is done, before its metrics are written.

    Returns:
        Whether they stay. If so, room was made among older ones.
    """
    folder, limit = settings.folder / FOLDER, settings.execution.checkpoints_gb * 1e9
    if not folder.is_dir() or settings.execution.keeps == "never":
        return False
    if settings.execution.keeps == "always":
        (folder / MAY_GO).unlink(missing_ok=True)
        return True
    own = _inodes(folder)
    if sum(own.values()) > limit:
        log.info("the codes take %.1f GB, more than checkpoints_gb: they are not kept", sum(own.values()) / 1e9)
        return False
    (folder / MAY_GO).touch()
    _make_room(Path(settings.execution.results), settings.folder, own, limit)
    return True


def end_run(settings: Settings, folder: RunFolder, metrics: dict[str, Any], progress: Progress) -> None:
    """Write the metrics of a run, and delete its finished blocks if it is done, unless they are to be kept.

    The order is what makes a kill at any moment harmless: the metrics first, then the finished blocks are deleted, which a
    run without metrics would continue from, and at last the progress, the trace of an unrecorded death.

    Those that a zero-shot task still needs stay, and make no room for others.
    """
    is_to_be_cleared = metrics["status"] == Status.DONE and not tasks_without_memory(metrics) and not keep(settings)
    if is_to_be_cleared:
        progress.stage = CLEARING
    folder.write_metrics(metrics)
    if is_to_be_cleared:
        delete_finished_blocks(folder.path)
    remove_progress(folder.path)


def clear_leftovers(folder: RunFolder) -> None:
    """Finish what a kill has cut off after the metrics were written."""
    if read_progress(folder.path) is None:
        return
    with folder.lock(wait=False) as is_mine:
        progress = read_progress(folder.path)
        if is_mine and progress is not None and folder.metrics() is not None:
            if progress["stage"] == CLEARING:  # else they are to be kept
                delete_finished_blocks(folder.path)
            remove_progress(folder.path)


def _make_room(results: Path, mine: Path, own: dict[int, int], limit: float) -> None:
    """Delete the oldest codes that may go until those that stay are within the limit, with `own`."""
    folders = [marker.parent for marker in results.glob(f"*/*/*/{FOLDER}/{MAY_GO}") if marker.parent.parent != mine]
    sizes, stays = {folder: _inodes(folder) for folder in folders}, dict(own)
    for folder in sorted(folders, key=_age, reverse=True):  # the newest first: they stay while there is room
        together = stays | sizes[folder]  # files that runs share count once
        if sum(together.values()) <= limit:
            stays = together
            continue
        run = RunFolder(folder.parent)
        with run.lock(wait=False) as is_mine:
            if is_mine and (folder.parent / METRICS).exists():
                log.info("deleting the codes of %s to make room (checkpoints_gb)", folder.parent)
                delete_finished_blocks(folder.parent)


def _age(folder: Path) -> float:
    with suppress(FileNotFoundError):
        return (folder / MAY_GO).stat().st_mtime
    return 0.0


def _inodes(folder: Path) -> dict[int, int]:
    """The size of each file, by its inode."""
    found = {}
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):
            status = file.stat()
            found[status.st_ino] = status.st_size
    return found


def _has_identity(file: Path, identity: dict[str, Any]) -> bool:
    try:
        return json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(identity))
    except (OSError, ValueError):  # gone, or damaged: its own run says so
        return False


def _link(file: Path, to: Path) -> None:
    try:
        os.link(file, to)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, to)

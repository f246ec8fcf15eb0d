"""How far a run has come: in memory for its metrics, and in its folder's `progress.json` for other processes.

The file exists while the run works. A process that is killed cannot remove it, so a `progress.json` without a living owner
tells that the run died, and where: `runners.sweeps.cells` shows it, `runners.sweeps.isolation` writes it into metrics.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from runners import console
from runners.errors import InputError
from runners.results.layers import LayerRecord
from runners.storage.files import write

PROGRESS = "progress.json"
WRITE_SECONDS = 1.0  # between two writes within a stage: steps can take microseconds, and each write flushes the disk


class Progress:
    """The progress of one run, which this process owns.

    Attributes:
        records: of the layers that are finished.
    """

    def __init__(self, folder: Path) -> None:
        self.records: list[LayerRecord] = []
        self._file = folder / PROGRESS
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        self._write_lock = threading.Lock()  # the run's thread and the writer's use one temporary name
        self.stage = "start"

    @property
    def stage(self) -> str:
        """The present stage of the run; setting it writes the file."""
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage = name
        self._stage_started = time.time()
        self._steps: dict[str, Any] = {}
        self._write()

    @contextmanager
    def follow_bars(self) -> Iterator[None]:
        """Take the steps of a stage from the progress bars that the console shows meanwhile."""
        console.watcher, before = self._on_step, console.watcher
        is_over = threading.Event()
        writer = threading.Thread(target=self._write_regularly, args=(is_over,), daemon=True)
        writer.start()
        try:
            yield
        finally:
            console.watcher = before
            is_over.set()
            writer.join()  # else it could write the file again after the run has removed it

    def words(self) -> str:
        """For a sentence: `during quantize, after 6 of 12 steps (block 1/2 fc2)`."""
        return progress_words(self._content())

    def _on_step(self, last: str, done: int, total: int) -> None:
        # A new dictionary, never a changed one: the writer's thread compares by identity and reads without a lock.
        self._steps = {"done": done, "total": total, "last": " ".join(last.split())}

    def _write_regularly(self, is_over: threading.Event) -> None:
        """Write the last step from a thread of its own: after a burst of steps the next one may take an hour."""
        written = self._steps
        while not is_over.wait(WRITE_SECONDS):
            if self._steps is not written:
                written = self._steps
                self._write()

    def _content(self) -> dict[str, Any]:
        stage = {"stage": self._stage, "stage_started": self._stage_started}
        return self._owner | stage | self._steps | {"updated": time.time()}

    def _write(self) -> None:
        # A full disk must not end a run here: the same error comes, with its sentence, where a result is written.
        with self._write_lock, suppress(InputError):
            write(self._file, json.dumps(self._content()) + "\n")


def read_progress(folder: Path) -> dict[str, Any] | None:
    """The last progress of the run in a folder; None without one, or where the file is damaged."""
    try:
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"pid", "host", "started", "stage"} <= content.keys() else None


def remove_progress(folder: Path) -> None:
    """Remove the file. Only after the metrics are written: in between, a death would leave no trace of the run."""
    with suppress(OSError):
        (folder / PROGRESS).unlink(missing_ok=True)


def progress_words(progress: dict[str, Any]) -> str:
    """For a sentence: `during quantize, after 6 of 12 steps (block 1/2 fc2)`."""
    steps = (
        f", after {progress['done']} of {progress['total']} steps ({progress['last']})" if "total" in progress else ""
    )
    return f"during {progress['stage']}{steps}"


def share_done(progress: dict[str, Any]) -> float | None:
    """Which share of the steps of its stage a run has done; None where the stage counts none."""
    return progress["done"] / progress["total"] if progress.get("total") else None


def owner_words(progress: dict[str, Any] | None) -> str:
    """For a sentence: `process 123 on HOST, since 12:30:01`."""
    if progress is None:
        return "another process"
    since = time.strftime("%H:%M:%S", time.localtime(progress["started"]))
    return f"process {progress['pid']} on {progress['host']}, since {since}"

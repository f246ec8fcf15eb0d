"""How far a run has come: in memory for its row, and in its folder's `progress.json` for whoever looks.

The file is there while the run works and for as long as nobody has seen that its process died: see `runners.sweeps.cells`.
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
EVERY = 1.0  # seconds between two writes within a stage


class Progress:
    """How far one run has come.

    Attributes:
        records: of the layers that are finished.
    """

    def __init__(self, folder: Path) -> None:
        self.records: list[LayerRecord] = []
        self._file = folder / PROGRESS
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
        self._writing = threading.Lock()
        self.stage = "start"

    @property
    def stage(self) -> str:
        """What the run is doing; setting it writes the file."""
        return self._stage

    @stage.setter
    def stage(self, name: str) -> None:
        self._stage = name
        self._steps: dict[str, Any] = {}
        self._write()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the progress bars that are shown meanwhile."""
        console.watcher, before = self._step, console.watcher
        over = threading.Event()
        writer = threading.Thread(target=self._write_now_and_then, args=(over,), daemon=True)
        writer.start()
        try:
            yield
        finally:
            console.watcher = before
            over.set()
            writer.join()

    def where(self) -> str:
        """For a sentence: `during quantize, after 6 of 12 steps (block 1/2 fc2)`."""
        return where(self._content())

    def _step(self, last: str, done: int, total: int) -> None:
        self._steps = {"done": done, "total": total, "last": " ".join(last.split())}

    def _write_now_and_then(self, over: threading.Event) -> None:
        """Steps can follow each other in no time and the next one take an hour: the last of them has to be on disk."""
        written = self._steps
        while not over.wait(EVERY):
            if self._steps is not written:
                written = self._steps
                self._write()

    def _content(self) -> dict[str, Any]:
        return self._owner | {"stage": self._stage, **self._steps, "updated": time.time()}

    def _write(self) -> None:
        with self._writing, suppress(InputError):  # who cannot write this hears of it where a result cannot be written
            write(self._file, json.dumps(self._content()) + "\n")


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder said last; None where it says nothing."""
    try:
        content = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"pid", "host", "started", "stage"} <= content.keys() else None


def remove_progress(folder: Path) -> None:
    """The run has ended, and its row is written."""
    with suppress(OSError):
        (folder / PROGRESS).unlink(missing_ok=True)


def where(progress: dict[str, Any]) -> str:
    """For a sentence: `during quantize, after 6 of 12 steps (block 1/2 fc2)`."""
    steps = (
        f", after {progress['done']} of {progress['total']} steps ({progress['last']})" if "done" in progress else ""
    )
    return f"during {progress['stage']}{steps}"


def owner(progress: dict[str, Any] | None) -> str:
    """For a sentence: `process 123 on HOST, since 12:30:01`."""
    if progress is None:
        return "another process"
    since = time.strftime("%H:%M:%S", time.localtime(progress["started"]))
    return f"process {progress['pid']} on {progress['host']}, since {since}"

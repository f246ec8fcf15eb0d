"""One GPU for each cell that runs: whoever holds the lock on a GPU's file has it, on this machine and for this user.

The kernel gives a lock back when its process dies, however it dies.
"""

import getpass
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import BaseFileLock, FileLock, Timeout

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
PAUSE = 0.5  # seconds between two looks at GPUs that are all taken


@contextmanager
def lease(device: str | None) -> Iterator[dict[str, str]]:
    """Hold one of the GPUs that this process may use, waiting for one where all are taken.

    Args:
        device: the setting; a GPU that it names, or `cpu`, is the user's own choice, and nothing is handed out.

    Yields:
        What to add to the environment of the process that is to use the GPU; nothing where there is none.
    """
    gpus = _visible() if device in (None, "cuda") else {}
    if not gpus:
        yield {}
        return
    folder = Path(tempfile.gettempdir()) / f"quantease-gpus-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locks = {gpu: FileLock(folder / f"{name}.lock") for gpu, name in gpus.items()}
    gpu = _take(locks)
    try:
        yield {VISIBLE: gpu}
    finally:
        locks[gpu].release()


def _take(locks: Mapping[str, BaseFileLock]) -> str:
    has_said_so = False
    while True:
        for gpu, lock in locks.items():
            with suppress(Timeout):
                lock.acquire(blocking=False)
                return gpu
        if not has_said_so:
            log.info("all %d GPUs are taken: waiting for one", len(locks))
            has_said_so = True
        time.sleep(PAUSE)


def _visible() -> dict[str, str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, with a name that holds everywhere.

    Counted without initializing CUDA, which a process that starts others must not do.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return {}
    chosen = [entry.strip() for entry in os.environ.get(VISIBLE, "").split(",") if entry.strip()]
    names = _uuids()
    return {gpu: names.get(gpu, gpu) for gpu in (chosen or [str(index) for index in range(count)])[:count]}


def _uuids() -> dict[str, str]:
    """UUIDs by index: the same index can be another GPU where a scheduler shows each job its own GPUs only."""
    command = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.split(",") for line in answer.stdout.splitlines()]
    return {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}

"""One GPU per running cell: whoever holds the lock on a GPU's file has the GPU, on this machine and for this user.

The kernel releases a lock when its process dies, however it dies: a killed cell never keeps its GPU.
"""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import BaseFileLock

from runners.errors import InputError
from runners.storage.locks import acquire, kernel_lock

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
SETTING = "TMPDIR=FOLDER"  # in the environment, with which the user moves the locks
POLL_SECONDS = 0.5  # between two tries while all GPUs are taken; a cell takes at least tens of seconds


@contextmanager
def lease(device: str | None) -> Iterator[dict[str, str]]:
    """Hold one of the GPUs that this process may use; wait while all of them are taken.

    Args:
        device: the setting. A named GPU (`cuda:1`) or `cpu` is the user's own choice: nothing is leased then.

    Yields:
        What to add to the environment of the process that is to use the GPU; empty where there is no GPU to lease.

    Raises:
        InputError: the folder for temporary files cannot be written, or has no locks.
    """
    gpus = _visible() if device in (None, "cuda") else {}
    if not gpus:
        yield {}
        return
    folder = _folder()
    locks = {gpu: kernel_lock(folder / f"{name}.lock") for gpu, name in gpus.items()}
    gpu = _acquire_any(locks)
    try:
        yield {VISIBLE: gpu}
    finally:
        locks[gpu].release()


def _folder() -> Path:
    """The folder of the locks of this user, who has a number everywhere, but in a container perhaps no name."""
    folder = Path(tempfile.gettempdir()) / f"quantease-gpus-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}): set {SETTING}") from error
    return folder


def _acquire_any(locks: Mapping[str, BaseFileLock]) -> str:
    """Wait for the first lock that is free and acquire it; returns its GPU."""
    has_said_so = False
    while True:
        for gpu, lock in locks.items():
            if acquire(lock, 0, SETTING):
                return gpu
        if not has_said_so:
            log.info("all %d GPUs are taken: waiting for one", len(locks))
            has_said_so = True
        time.sleep(POLL_SECONDS)


def _visible() -> dict[str, str]:
    """The GPUs that this process may use: as CUDA_VISIBLE_DEVICES names them, each with the name of its lock.

    Neither call initializes CUDA: a process that has done so must not fork others.
    """
    count = torch.cuda.device_count()
    if count == 0:
        return {}
    chosen = [entry.strip() for entry in os.environ.get(VISIBLE, "").split(",") if entry.strip()]
    uuids = _uuids()
    return {gpu: uuids.get(gpu, gpu) for gpu in (chosen or [str(index) for index in range(count)])[:count]}


def _uuids() -> dict[str, str]:
    """UUIDs by index; empty without NVIDIA's driver or its Python package: locks are then named by index.

    UUIDs are safer: a scheduler that shows each job only its own GPU calls each of them number 0.
    """
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {str(index): pynvml.nvmlDeviceGetUUID(handle) for index, handle in enumerate(handles)}
    except pynvml.NVMLError:  # a GPU that has fallen off the bus
        return {}
    finally:
        pynvml.nvmlShutdown()

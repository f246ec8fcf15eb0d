"""Files that are there whole or not at all, and locks that die with their process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from runners.errors import InputError


def write(path: Path, content: str) -> None:
    """Write a file so that it is there whole or not at all: to a temporary name, flushed to the disk, then renamed.

    Raises:
        InputError: the file cannot be written (no room, no permission); what stood there before is untouched.
    """
    with _replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """The same for a safetensors file.

    Raises:
        InputError: as for `write`.
    """
    with _replacing(path) as partial:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, which is flushed to the disk and takes its place if nothing goes wrong."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # several processes may write the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({why}): make room there or set results=FOLDER") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def claim(file: Path, timeout: float) -> Iterator[bool]:
    """Lock a file against all other processes; yields False where that takes longer than `timeout` seconds (-1: never).

    Raises:
        InputError: the file system has no locks, or refuses them.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{file} cannot be locked ({reason}): set results=FOLDER, where that is possible") from error
    try:
        yield True
    finally:
        lock.release()


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder that results cannot be written to.

    Raises:
        InputError: saying why.
    """
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"nothing can be written to {folder} ({error.strerror or error}): set results=FOLDER"
        ) from error

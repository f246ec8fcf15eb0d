"""Atomic files.

A reader sees the old content of a file or the new one, never a part: also after a kill, a full disk or a power failure.
"""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from runners.errors import InputError, NoRoom

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what is wrong is the disk, not what is written to it


def write(path: Path, content: str) -> None:
    """Write a text file atomically.

    Raises:
        NoRoom: the disk is full, over quota or broken; the old content of the file is untouched.
        InputError: the file cannot be written for another reason, such as no permission; the same holds.
    """
    with _atomically(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, from any device.

    Raises:
        NoRoom, InputError: as for `write`.
    """
    with _atomically(path) as partial:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, partial, metadata)


@contextmanager
def _atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary name for the caller to write to; that file replaces `path` if nothing goes wrong."""
    # In the same folder, because a rename is atomic only within a file system. With the process id, because several
    # processes may write the same file (the cache). `RunFolder.clear_result` removes what a killed process leaves.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # before the rename, or a power failure could leave the new name with no content
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # after an error; a rename has left nothing to remove


def is_of_disk(error: BaseException) -> bool:
    """Whether the error says that a disk is full, over its quota or broken."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])  # Rust's words
    return number in DISK


def _not_written(path: Path, error: Exception) -> InputError:
    why = f"{path} cannot be written ({getattr(error, 'strerror', None) or error})"
    if is_of_disk(error):
        return NoRoom(f"{why}: make room in {path.parent}, and the same command again goes on")
    return InputError(f"{why}: allow that, or set results=FOLDER")


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder that results cannot be written to. It leaves nothing behind, nor makes the folder.

    Raises:
        InputError: with the reason.
    """
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        # Only writing tells: permissions do not show quotas or read-only mounts.
        probe = there / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = f"nothing can be written to {folder} ({error.strerror or error})"
        if is_of_disk(error):
            raise NoRoom(f"{why}: make room there, and the same command again goes on") from error
        raise InputError(f"{why}: set results=FOLDER") from error

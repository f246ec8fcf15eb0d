"""Atomic files.

A reader sees the old content of a file or the new one, never a part: also after a kill, a full disk or a power failure.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from runners.errors import InputError


def write(path: Path, content: str) -> None:
    """Write a text file atomically.

    Raises:
        InputError: the file cannot be written (no room, no permission); its old content is untouched.
    """
    with _atomically(path) as partial:
        partial.write_text(content, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically, from any device.

    Raises:
        InputError: as for `write`.
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
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written ({why}): make room there or set results=FOLDER") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)  # after an error; a rename has left nothing to remove


def check_writable(folder: Path) -> None:
    """Refuse, before any work, a folder that results cannot be written to.

    Raises:
        InputError: with the reason.
    """
    probe = (
        folder / f".writable-{os.getpid()}"
    )  # only writing tells: permissions do not show quotas or read-only mounts
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"nothing can be written to {folder} ({error.strerror or error}): set results=FOLDER"
        ) from error

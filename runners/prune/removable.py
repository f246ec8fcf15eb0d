"""What can go: named, with its size and the reason, before anything is removed."""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from runners.errors import InputError


@dataclass(frozen=True)
class Removable:
    """Something that can go.

    Attributes:
        path: where it is, as it is shown.
        why: the reason, in a few words.
        size: in bytes.
        remove: removes it; answers whether it is gone: what a process works on is left to that process.
    """

    path: Path
    why: str
    size: int
    remove: Callable[[], bool]

    def removed(self) -> bool:
        """Remove it; whether it is gone.

        Raises:
            InputError: the file system refuses.
        """
        try:
            return self.remove()
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be removed ({error.strerror}): what was listed before it is gone"
            ) from None


def unused(path: Path, why: str) -> Removable:
    """A file or folder that no process works on."""
    return Removable(path, why, size_of([path]), lambda: delete(path))


def size_of(paths: Iterable[Path]) -> int:
    """The bytes of files and of all that is in folders; links count as what they are, not as what they lead to."""
    files = [file for path in paths for file in (path, *path.rglob("*"))]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())


def delete(path: Path) -> bool:
    """Delete a file, or a folder with all that is in it, unless it is gone already; true."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    return True

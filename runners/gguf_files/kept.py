"""Where converted GGUF files are kept: `converted/NAME-CONTENT-VERSION` in the user's cache, with a lock beside each folder.

NAME is the file's, CONTENT its fingerprint, VERSION a hash of transformers' version and of our conversion's code: what
another version has made is never read again by this one. A process that has taken a folder holds it until it ends, so that
no other removes the weights that it still reads.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import IO

from runners.project import user_cache
from runners.storage.fingerprint import code_fingerprint, fingerprint
from runners.storage.locks import file_lock, lock_shared, others_share

NOTE = "gguf.json"  # in the folder: what it was made of; written last, so a folder without it is not whole

_held: dict[Path, IO[bytes]] = {}  # the notes of the folders that this process reads from


def place_of(file: Path) -> Path:
    """The folder of a GGUF file; it may not be there yet."""
    return _all() / f"{file.stem}-{fingerprint([file])}-{_version()}"


def lock_of(folder: Path) -> Path:
    """The lock of a folder, held while it is made or removed."""
    return folder.with_name(f"{folder.name}.lock")


def hold(folder: Path) -> None:
    """Keep others from removing a whole folder until this process ends, where the file system can do that."""
    if folder not in _held:
        with suppress(OSError):
            note = (folder / NOTE).open("rb")
            lock_shared(note)
            _held[folder] = note


def outdated() -> dict[Path, str]:
    """What this version never reads: folders of other versions, and parts that killed conversions have left; with why."""
    found: dict[Path, str] = {}
    for path in sorted(_all().glob("*-*")):
        if path.name.endswith(".partial"):
            found[path] = "left by a conversion that was killed"
        elif re.search(r"-[0-9a-f]{16}-[0-9a-f]{8}$", path.name) and not path.name.endswith(f"-{_version()}"):
            found[path] = "converted by another version of the code or of transformers"
    return {path: why for path, why in found.items() if path.is_dir()}


@contextmanager
def taken_out_of_use(path: Path) -> Iterator[bool]:
    """Hold something `outdated` for its removal; yields whether no process makes it or reads from it."""
    folder = path.with_name(re.sub(r"\.\d+\.partial$", "", path.name))
    with file_lock(lock_of(folder), 0) as is_mine:
        is_free = is_mine and not others_share(path / NOTE)
        yield is_free
        if is_free and not folder.exists():
            lock_of(folder).unlink(missing_ok=True)


def _all() -> Path:
    return user_cache() / "converted"


@cache
def _version() -> str:
    words = f"{version('transformers')} {code_fingerprint('runners/gguf_files/*.py')}"
    return sha256(words.encode()).hexdigest()[:8]

"""Models that were converted from GGUF files by another version than this one, in the user's cache, for all checkouts."""

from collections.abc import Iterator
from pathlib import Path

from runners.gguf_files import kept
from runners.prune.removable import Removable, delete, size_of


def converted_leftovers() -> Iterator[Removable]:
    """What this version never reads. It may be another checkout's, which then converts its file again."""
    for path, why in kept.outdated().items():
        yield _folder(path, why)


def _folder(path: Path, why: str) -> Removable:
    def remove() -> bool:
        with kept.taken_out_of_use(path) as is_free:
            return is_free and delete(path)

    return Removable(path, why, size_of([path]), remove)

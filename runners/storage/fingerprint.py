"""Short hashes of files and folders: equal for equal content, wherever it is on disk."""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path

from runners.project import ROOT

OF_A_CHECKPOINT = {
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "quantize_config.json",  # of a checkpoint that is quantized already: how
    "quant_config.json",
}
CODE = ("quantease/**/*.py", "baselines/**/*.py", "runners/**/*.py")  # all that can change a number, and a little more
SAMPLES, SAMPLE = 64, 65_536  # pieces of a large file that are read, and bytes of each


@lru_cache
def checkpoint_fingerprint(folder: Path) -> str:
    """The fingerprint of a checkpoint's weights, configuration and tokenizer."""
    files = folder.glob("*") if folder.is_dir() else []
    return fingerprint(file for file in files if file.name in OF_A_CHECKPOINT or file.suffix == ".safetensors")


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of names, sizes and contents; for files of more than 4 MB, of 64 pieces spread evenly over each.

    Two checkpoints have two fingerprints, but a bit that flips between the pieces of a large file is not seen: to hash all
    of it would take longer than the checks before a sweep may take.
    """
    digest = sha256()
    for file in sorted(files):  # the order of a folder's entries differs between file systems
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            if size <= SAMPLES * SAMPLE:
                digest.update(opened.read())
                continue
            for place in range(SAMPLES):  # the first piece is at the start of the file, the last at its very end
                opened.seek(place * (size - SAMPLE) // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE))
    return digest.hexdigest()[:16]


def file_sha256(file: Path) -> str:
    """The SHA-256 of a whole file."""
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


@lru_cache
def code_fingerprint(*patterns: str, root: Path = ROOT) -> str:
    """The fingerprint of the project's own modules.

    Args:
        patterns: globs relative to `root`; `**` matches any depth. Default: every module that can change a number.
        root: the project's root.

    Raises:
        LookupError: a pattern matches no file. A module that was renamed would otherwise leave every key that it is part
            of, and stale data would pass for fresh.
    """
    digest = sha256()
    for file in sorted({file for pattern in patterns or CODE for file in _matching(root, pattern)}):
        digest.update(f"{file.relative_to(root).as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _matching(root: Path, pattern: str) -> list[Path]:
    found = list(root.glob(pattern))
    if not found:
        raise LookupError(f"no file below {root} matches {pattern}: the key that names it is out of date")
    return found

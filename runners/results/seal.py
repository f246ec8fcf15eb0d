"""The seal of a run that has ended: what each of its files was when `metrics.json`, which holds the seal, was written.

A digit that was changed, a file that was cut off, and one that is another run's are told in a sentence that names the file.
`metrics.json` has a checksum of its own text as well, which `metrics.parse` compares. Results older than the seal have
none: what their files say of each other is compared instead (`runners.results.consistency`).

Outside the seal is what may change after the end: finished blocks (`checkpoint/`, which have checksums of their own),
`audit.csv`, logs and locks. Line ends do not count, because git may change them.
"""

import csv
import io
from hashlib import sha256
from pathlib import Path
from typing import Any

from runners.results.consistency import contradiction
from runners.results.metrics import BYTES, CHECKSUM, METRICS, ROWS, SEAL, SEALED_FILES, damaged, read

SEALED = ("config.yaml", "environment.json", "layers.csv", "sweeps.csv", "windows.csv")  # those of them that a run has

Facts = dict[str, Any]


def facts_of_files(folder: Path) -> dict[str, Facts]:
    """Size, checksum and, of a table, number of rows of each file in a run's folder that is to be sealed, by its name."""
    contents = {name: _content(folder / name) for name in SEALED}
    return {name: _facts(name, content) for name, content in contents.items() if content is not None}


def read_run(folder: Path) -> dict[str, Any]:
    """The metrics of a run that has ended, without their seal, after all of its files were compared with it.

    Raises:
        FileNotFoundError, NotADirectoryError: the run has not ended.
        ValueError: a file is damaged; a sentence with its name and the remedy.
    """
    metrics = read(folder / METRICS)
    try:
        _refuse_damage(folder, metrics)
    except ValueError:
        # A run that is forced again removes its metrics before it writes any other file: what was read is of the past then.
        if read(folder / METRICS) != metrics:
            return read_run(folder)
        raise
    return {key: value for key, value in metrics.items() if key != SEAL}


def _refuse_damage(folder: Path, metrics: dict[str, Any]) -> None:
    if SEAL not in metrics:
        if (found := contradiction(folder, metrics)) is not None:
            raise ValueError(damaged(*found))
        return
    for name in SEALED:
        if what := _damage(name, _content(folder / name), metrics[SEAL][SEALED_FILES].get(name)):
            raise ValueError(damaged(folder / name, what))


def _damage(name: str, content: bytes | None, sealed: Facts | None) -> str | None:
    """What is wrong with a file, in words; None: nothing.

    Args:
        content: None: there is no such file.
        sealed: its facts when the run ended; None: there was none.
    """
    if content is None:
        return None if sealed is None else "it is gone"
    if sealed is None:
        return "it was not there when the run ended"
    if sha256(content).hexdigest() == sealed[CHECKSUM]:
        return None
    if len(content) == sealed[BYTES]:
        return "its checksum is not what it was when the run ended: it was changed since"
    found = _facts(name, content)
    rows = f" and {found[ROWS]} rows" if ROWS in found else ""
    had = f" and {sealed[ROWS]}" if ROWS in sealed else ""
    return f"it has {found[BYTES]} bytes{rows}, and had {sealed[BYTES]}{had} when the run ended"


def _facts(name: str, content: bytes) -> Facts:
    facts: Facts = {BYTES: len(content), CHECKSUM: sha256(content).hexdigest()}
    if name.endswith(".csv"):
        rows = csv.reader(io.StringIO(content.decode("utf-8", errors="replace"), newline=""))
        facts[ROWS] = max(0, sum(1 for _ in rows) - 1)  # without the heading
    return facts


def _content(file: Path) -> bytes | None:
    """The content with the line ends of Unix; None where the file cannot be read."""
    try:
        return file.read_bytes().replace(b"\r\n", b"\n")
    except OSError:
        return None

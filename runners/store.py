"""A run's folder: small files, each written to a temporary name and renamed, `metrics.json` last.

`metrics.json` exists if and only if the run has ended. Its `status` is `done`, `failed` or `unsupported`. Only the process
that holds the run's lock writes or clears it.
"""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from runners.errors import InputError
from runners.quantization import LayerRecord

METRICS = "metrics.json"
LOCK = ".lock"  # in a run's folder; who works on the run holds it, and the kernel gives it back when that process dies
PATIENCE = 1.0  # seconds that a lock may be held by someone who only looks


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def metrics(self) -> dict[str, Any] | None:
        """What the run has ended with; None if it has not ended.

        Raises:
            InputError: the file is damaged.
        """
        file = self.path / METRICS
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({error}): delete it to run this again, or use force=true"
            ) from error
        if not isinstance(metrics, dict) or "status" not in metrics:
            raise InputError(f"{file} is not the metrics of a run: delete it to run this again, or use force=true")
        return metrics

    def settled(self, force: bool, retry_failed: bool) -> dict[str, Any] | None:
        """What the run has ended with, where it is not to be run again: done, unsupported, or failed and not retried."""
        metrics = None if force else self.metrics()
        if metrics is not None and metrics["status"] == "failed":
            return None if retry_failed or metrics.get("reason") == "interrupted" else metrics
        return metrics

    @contextmanager
    def claim(self, wait: bool) -> Iterator[bool]:
        """Hold the run for this process alone; yields False at once where another process holds it, or waits for it.

        Raises:
            InputError: the file system has no locks, or refuses them.
        """
        with claim(self.path / LOCK, -1 if wait else PATIENCE) as mine:
            yield mine

    def is_running(self) -> bool:
        """Whether a living process holds the run."""
        lock = self.path / LOCK
        if not lock.exists():
            return False
        with claim(lock, 0) as mine:
            return not mine

    def clear(self) -> None:
        """Forget how the run ended, before it is run again."""
        (self.path / METRICS).unlink(missing_ok=True)

    def write_config(self, identity: dict[str, Any]) -> None:
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity)))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_layers(self, records: list[LayerRecord]) -> None:
        names = [field.name for field in fields(LayerRecord)]
        self._write_csv("layers.csv", names, (asdict(record) for record in records))

    def write_windows(self, losses: dict[str, list[float]]) -> None:
        """The negative log-likelihood of every window of every text."""
        rows = (
            {"text": text, "window": window, "nll": f"{nll:.9g}"}
            for text, values in losses.items()
            for window, nll in enumerate(values)
        )
        self._write_csv("windows.csv", ["text", "window", "nll"], rows)

    def _write_csv(self, name: str, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(self.path / name, text.getvalue())


def write(path: Path, content: str) -> None:
    """Write a file so that it is there whole or not at all: to a temporary name, flushed to the disk, then renamed.

    Raises:
        InputError: the file cannot be written (no room, no permission); what stood there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}): make room there or set results=FOLDER"
        ) from error


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

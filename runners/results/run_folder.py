"""A run's folder: small files, each written to a temporary name and renamed, `metrics.json` last.

`metrics.json` exists if and only if the run has ended. Its `status` is `done`, `failed` or `unsupported`. Only the process
that holds the run's lock writes or clears it.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners.errors import InputError
from runners.results.layers import LayerRecord
from runners.results.metrics import parse
from runners.storage.files import claim, write

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
            metrics = parse(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{file} cannot be read ({error}): delete it to run this again, or use force=true"
            ) from error
        if not self.path.name.endswith(str(metrics.get("digest", ""))):
            raise InputError(
                f"{file} is of another run, {metrics['digest']}: delete it to run this again, or use force=true"
            )
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
        """Forget how the run ended, before it is run again, and what a process that was killed had not finished writing."""
        (self.path / METRICS).unlink(missing_ok=True)
        for partial in self.path.rglob("*.partial"):
            partial.unlink(missing_ok=True)

    def write_config(self, identity: dict[str, Any]) -> None:
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity)))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_layers(self, records: list[LayerRecord]) -> None:
        """A row a layer; and where a method has tracked its sweeps, a row a sweep."""
        self._write_csv("layers.csv", list(records[0].row), (record.row for record in records))
        sweeps = [
            {"block": record.block, "layer": record.layer, "sweep": sweep, "relative_error": error}
            for record in records
            for sweep, error in enumerate(record.history, start=1)
        ]
        if sweeps:
            self._write_csv("sweeps.csv", list(sweeps[0]), sweeps)

    def write_windows(self, measured: dict[str, dict[str, list[float]]]) -> None:
        """What was measured on every window of every text: text to measure to a value a window."""
        measures = list(dict.fromkeys(name for values in measured.values() for name in values))
        rows = [
            {"text": text, "window": window} | {name: f"{values[name][window]:.9g}" for name in values}
            for text, values in measured.items()
            for window in range(len(next(iter(values.values()))))
        ]
        self._write_csv("windows.csv", ["text", "window", *measures], rows)

    def _write_csv(self, name: str, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write(self.path / name, text.getvalue())

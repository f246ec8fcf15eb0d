"""A run's folder: small files, each written to a temporary name and renamed, `metrics.json` last.

`metrics.json` exists if and only if the run has ended. Only the process that holds the run's lock writes or removes it.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners.errors import InputError
from runners.results.layers import LayerRecord
from runners.results.metrics import METRICS, REFERENCE, Reason, Status, sealed_text, tasks_without_memory
from runners.results.seal import SEALED, facts_of_files, read_run
from runners.storage.files import write
from runners.storage.locks import file_lock

ENVIRONMENT = "environment.json"
LOCK = ".lock"  # in a run's folder; held by the process that works on the run, and released by the kernel when it dies
KEPT_BLOCKS = "checkpoint/identity.json"  # there as long as the finished blocks of a run are
LOCK_SECONDS = 1.0  # to wait for the lock: `is_running` holds it for a moment, and must not keep a run from starting


class RunFolder:
    """Reads and writes the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def metrics(self) -> dict[str, Any] | None:
        """The metrics of the run; None if it has not ended.

        Raises:
            InputError: a file of the run is damaged, or the metrics are of another run.
        """
        file = self.path / METRICS
        try:
            metrics = read_run(self.path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise InputError(str(error)) from error
        if not self.path.name.endswith(str(metrics.get("digest", ""))):
            raise InputError(
                f"{file} is of another run, {metrics['digest']}: delete it to run this again, or use force=true"
            )
        return metrics

    def environment(self) -> dict[str, Any]:
        """What `environment.json` says of the machine and the libraries; empty where it is missing or damaged."""
        try:
            content = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    def metrics_to_keep(self, force: bool, retry_failed: bool) -> dict[str, Any] | None:
        """The metrics of a run that is not to be run again; None where it is.

        Done and unsupported runs are kept, failed ones unless `retry_failed`. An interrupted run is never kept: nothing is
        wrong with it, and its finished blocks are on disk. Nor is one that is done but for `tasks_left`: these are tried
        again, and its result stands meanwhile.

        Raises:
            InputError: as for `metrics`.
        """
        metrics = None if force else self.metrics()
        if metrics is not None and metrics["status"] == Status.FAILED:
            return None if retry_failed or metrics.get("reason") == Reason.INTERRUPTED else metrics
        return None if metrics is not None and self.tasks_left(metrics) else metrics

    def tasks_left(self, metrics: Mapping[str, Any]) -> list[str]:
        """The zero-shot tasks that a run that is done can try again: memory ran out, and its quantized weights are kept."""
        is_kept = metrics["method"] == REFERENCE or (self.path / KEPT_BLOCKS).exists()
        return tasks_without_memory(metrics) if metrics["status"] == Status.DONE and is_kept else []

    def is_to_run(self, force: bool, retry_failed: bool) -> bool:
        """Whether a run would run now. One that is damaged would not: it is refused."""
        try:
            return self.metrics_to_keep(force, retry_failed) is None
        except InputError:
            return False

    @contextmanager
    def lock(self, wait: bool) -> Iterator[bool]:
        """Hold the run for this process alone.

        Args:
            wait: until another process gives it back.

        Yields:
            Whether this process holds the run; False only without `wait`.

        Raises:
            InputError: the file system has no locks, or refuses them.
        """
        with file_lock(self.path / LOCK, -1 if wait else LOCK_SECONDS) as is_mine:
            yield is_mine

    def is_running(self) -> bool:
        """Whether a living process holds the run."""
        lock = self.path / LOCK
        if not lock.exists():  # locking would create it: looking at a study must not write to it
            return False
        with file_lock(lock, 0) as is_mine:
            return not is_mine

    def clear_result(self) -> None:
        """Remove the result before the run is run again, and the temporary files of a process that was killed.

        The metrics first: without them nobody takes the other files for a result. The others, too, because a run that fails
        would be sealed together with the tables of an earlier one.
        """
        for name in (METRICS, *SEALED):
            (self.path / name).unlink(missing_ok=True)
        for partial in self.path.rglob("*.partial"):
            partial.unlink(missing_ok=True)

    def write_config(self, identity: dict[str, Any]) -> None:
        """Write `config.yaml`."""
        write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(identity)))

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`, with the seal of the files that the run has written before."""
        write(self.path / METRICS, sealed_text(metrics, facts_of_files(self.path)))

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file. NaN is refused: JSON has none, and `metrics.parse` would call the file damaged."""
        write(self.path / name, json.dumps(content, indent=2, allow_nan=False) + "\n")

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Write `layers.csv`, one row per layer; where sweeps were tracked, also `sweeps.csv`, one per layer and sweep."""
        self._write_csv("layers.csv", list(records[0].row), (record.row for record in records))
        sweeps = [
            {"block": record.block, "layer": record.layer, "sweep": sweep, "relative_error": error}
            for record in records
            for sweep, error in enumerate(record.history, start=1)
        ]
        if sweeps:
            self._write_csv("sweeps.csv", list(sweeps[0]), sweeps)

    def write_windows(self, measured: dict[str, dict[str, list[float]]]) -> None:
        """Write `windows.csv`, one row per text and window.

        Args:
            measured: by text and measure, one value per window.
        """
        measures = list(dict.fromkeys(name for values in measured.values() for name in values))
        rows = [
            # Nine digits are enough to tell any two float32 numbers apart.
            {"text": text, "window": window} | {name: f"{values[name][window]:.9g}" for name in values}
            for text, values in measured.items()
            for window in range(len(next(iter(values.values()))))
        ]
        self._write_csv("windows.csv", ["text", "window", *measures], rows)

    def _write_csv(self, name: str, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
        write_csv(self.path / name, columns, rows)


def write_csv(file: Path, columns: list[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write a table: whole, or not at all. None is an empty cell.

    Raises:
        InputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(file, text.getvalue())

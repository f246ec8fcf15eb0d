"""A run's folder: small files, each written to a temporary name and renamed, `metrics.json` last.

`metrics.json` exists if and only if the run has ended. Its `status` is `done`, `failed` or `unsupported`.
"""

import csv
import io
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from runners.errors import InputError
from runners.quantization import LayerRecord
from runners.rows import parse

METRICS = "metrics.json"


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

    def finished(self) -> bool:
        """Whether the run has ended with an answer that running it again would not change."""
        metrics = self.metrics()
        return metrics is not None and metrics["status"] in ("done", "unsupported")

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

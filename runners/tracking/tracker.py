"""The tracker of a run: its interface, and the guarantee that an error in W&B or trackio is a warning and ends no run.

One tracked run per cell, closed whatever happens.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runners.config.settings import Settings
from runners.results.layers import LayerRecord

log = logging.getLogger(__name__)


class RunTracker(Protocol):
    """The events of a run that its tracker receives."""

    @property
    def where(self) -> str | None:
        """For the user: the run's address, or the command that shows it."""
        ...

    def layer(self, record: LayerRecord) -> None:
        """A layer is finished."""
        ...

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """The run has ended, well or not, with these metrics."""
        ...


class Backend(RunTracker, Protocol):
    """A tracker as W&B or trackio implement it: it may raise, and must be closed."""

    def close(self) -> None:
        """Send or write what is still in memory."""
        ...


class NoTracker:
    """`tracker=none`, and a tracker that did not start."""

    where: str | None = None

    def layer(self, record: LayerRecord) -> None:
        """Nothing."""

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Nothing."""


class WarningTracker:
    """Passes everything to a backend, and turns its exceptions into warnings."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.where: str | None = backend.where

    def layer(self, record: LayerRecord) -> None:
        """Pass on a layer that is finished."""
        with _errors_as_warnings():
            self._backend.layer(record)

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Pass on how the run has ended."""
        with _errors_as_warnings():
            self._backend.finish(metrics, records)


@contextmanager
def track(settings: Settings, folder: Path) -> Iterator[RunTracker]:
    """The tracker of one run, whose files are in `folder`; it is closed on leaving, whatever happened."""
    backend = None
    with _errors_as_warnings():
        backend = _start(settings, folder)
    if backend is None:
        yield NoTracker()
        return
    try:
        yield WarningTracker(backend)
    finally:
        with _errors_as_warnings():
            backend.close()


def _start(settings: Settings, folder: Path) -> Backend | None:
    if settings.execution.tracker.name == "wandb":
        from runners.tracking.weights_and_biases import WandbTracker, start

        run = start(settings)
        return None if run is None else WandbTracker(run, folder, settings)
    if settings.execution.tracker.name == "trackio":
        from runners.tracking.dashboard import TrackioTracker

        return TrackioTracker(settings, folder)
    return None


@contextmanager
def _errors_as_warnings() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("tracker: %s: %s", type(error).__name__, str(error).split("\n")[0])

"""Mirror a run to a tracker, W&B or trackio; the results on disk stay the truth.

One tracked run a job, ended whatever happens. What goes wrong in a tracker is said, and does not end a run.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runners.config.settings import Settings
from runners.results.layers import LayerRecord

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What an experiment tells its tracker."""

    @property
    def where(self) -> str | None:
        """For the user: the run's address, or the command that shows it."""
        ...

    def layer(self, record: LayerRecord) -> None: ...

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None: ...


class Backend(Tracker, Protocol):
    """A tracker that may raise, and that must be closed."""

    def close(self) -> None: ...


class NoTracker:
    """`tracker=none`, and a tracker that did not start."""

    where: str | None = None

    def layer(self, record: LayerRecord) -> None:
        """Nothing."""

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Nothing."""


class Harmless:
    """A tracker whose mistakes are warnings."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.where: str | None = backend.where

    def layer(self, record: LayerRecord) -> None:
        """Tell the backend of a layer."""
        with _harmless():
            self._backend.layer(record)

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Tell the backend how the run ended."""
        with _harmless():
            self._backend.finish(metrics, records)


@contextmanager
def track(settings: Settings, folder: Path) -> Iterator[Tracker]:
    """The tracker of one run, whose files are in `folder`; it is closed on leaving, whatever happened."""
    backend = None
    with _harmless():
        backend = _start(settings, folder)
    if backend is None:
        yield NoTracker()
        return
    try:
        yield Harmless(backend)
    finally:
        with _harmless():
            backend.close()


def _start(settings: Settings, folder: Path) -> Backend | None:
    if settings.execution.tracker.name == "wandb":
        from runners.tracking.weights_and_biases import WandbTracker, start

        return WandbTracker(start(settings), folder, settings)
    if settings.execution.tracker.name == "trackio":
        from runners.tracking.dashboard import TrackioTracker

        return TrackioTracker(settings, folder)
    return None


@contextmanager
def _harmless() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("tracker: %s: %s", type(error).__name__, str(error).split("\n")[0])

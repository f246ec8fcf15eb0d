"""Mirror a run to Weights & Biases; the results on disk stay the truth.

One run a job, finished whatever happens. Online where the user is logged in and the server answers, else offline into the
run's folder, with everything that W&B stages, so that the folder can be copied and synced from another machine.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from runners.records import LayerRecord
from runners.settings import Settings

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30  # seconds to wait for the server before going offline


class Tracker(Protocol):
    """What an experiment tells its tracker."""

    where: str | None  # for the user: the run's address, or the folder it lies in

    def layer(self, record: LayerRecord) -> None: ...

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None: ...


class NoTracker:
    """`tracker=none`."""

    where: str | None = None

    def layer(self, record: LayerRecord) -> None:
        """Nothing."""

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Nothing."""


class WandbTracker:
    """One W&B run."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self._layers = 0
        self._exit_code = 1  # until the run is known to have gone well
        self.where = str(Path(run.dir).parent) if run.settings.mode == "offline" else run.url
        run.define_metric("layer_index")
        run.define_metric("layer/*", step_metric="layer_index")

    def layer(self, record: LayerRecord) -> None:
        """Each layer's error, and what it cost, against the layer's index."""
        values = {"layer/relative_error": record.relative_error, "layer/seconds": record.seconds}
        with _harmless():
            self._run.log({"layer_index": self._layers} | values)
        self._layers += 1

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """The table of layers, and `metrics.json` as the run's summary."""
        import wandb

        self._exit_code = int(metrics["status"] != "done")
        with _harmless():
            if records:
                rows: Any = [list(record.row.values()) for record in records]
                self._run.log({"layers": wandb.Table(columns=list(records[0].row), data=rows)})
            self._run.summary.update(metrics)

    def close(self) -> None:
        """End the run, as failed unless it is known to have gone well."""
        with _harmless():
            self._run.finish(exit_code=self._exit_code)


@contextmanager
def track(settings: Settings, folder: Path) -> Iterator[Tracker]:
    """The tracker of one run; it is finished on leaving, whatever happened."""
    run = None
    if settings.tracker.name == "wandb":
        with _harmless():
            run = _start(settings, folder)
    if run is None:
        yield NoTracker()
        return
    tracker = WandbTracker(run)
    try:
        yield tracker
    finally:
        tracker.close()


@contextmanager
def _harmless() -> Iterator[None]:
    """What goes wrong in W&B is said, and does not end a run: the results on disk are the truth."""
    try:
        yield
    except Exception as error:
        log.warning("W&B: %s: %s", type(error).__name__, str(error).split("\n")[0])


def _start(settings: Settings, folder: Path) -> Any:
    # Staged artifacts would be left behind in the user's home when the run's folder is copied to sync it elsewhere.
    os.environ["WANDB_DATA_DIR"] = str((folder / "wandb" / "data").absolute())
    import wandb

    mode = settings.tracker.mode or ("online" if _logged_in() else "offline")
    options: dict[str, Any] = {
        "project": settings.tracker.project,
        "entity": settings.tracker.entity,
        "id": settings.digest,
        "name": settings.run_name,
        "group": settings.study,
        "job_type": "quantize" if settings.quantizes else "reference",
        "tags": _tags(settings),
        "config": settings.resolved(),
        "dir": str(folder),
        "settings": wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT, console="off"),
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", resume="allow", **options)
        except wandb.Error as error:
            log.warning("W&B does not answer (%s): tracking offline into %s", str(error).split("\n")[0], folder)
    return wandb.init(mode="offline", **options)


def _tags(settings: Settings) -> list[str]:
    if not settings.quantizes:
        return [settings.method.name, settings.model.name]
    groups = "per-channel" if settings.group_size is None else f"group {settings.group_size}"
    tags = [settings.method.name, settings.model.name, f"{settings.bits} bits", groups, f"seed {settings.seed}"]
    return tags + ["act-order"] * settings.act_order + ["symmetric"] * settings.symmetric


def _logged_in() -> bool:
    """Whether W&B has credentials; never asks for any."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error:
        return False

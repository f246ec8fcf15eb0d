"""One W&B run per cell: online if the user is logged in and the server answers, else offline into the study's folder.

The offline runs of a study are all in `results/<study>/wandb/`, where W&B's own viewer, `wandb leet`, shows them together;
`python -m runners.sync` sends them.
"""

import logging
import os
from pathlib import Path
from shlex import quote
from typing import Any

from runners.config.settings import Settings
from runners.results.layers import LayerRecord
from runners.results.metrics import Status
from runners.tracking import content
from runners.tracking.figures import layer_error_figure, pixels

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30  # seconds to wait for the server before going offline
OFFLINE = ("offline", "disabled", "dryrun")  # values of WANDB_MODE with which W&B asks no server


class WandbTracker:
    """One W&B run."""

    def __init__(self, run: Any, folder: Path, settings: Settings) -> None:
        self._run = run
        self._folder = folder
        self._curves = content.Curves()
        self._exit_code = 1  # until the run is known to have gone well
        offline = run.settings.mode == "offline"
        self.where: str | None = f"wandb leet {quote(str(settings.study_folder / 'wandb'))}" if offline else run.url
        for step in (content.LAYER_INDEX, content.BLOCK, content.SWEEP):
            run.define_metric(step, hidden=True)
        run.define_metric(content.LAYER + "*", step_metric=content.LAYER_INDEX)
        run.define_metric(content.ERROR + "*", step_metric=content.BLOCK)
        run.define_metric(content.CONVERGENCE, step_metric=content.SWEEP)

    def layer(self, record: LayerRecord) -> None:
        """Log one point per curve."""
        self._run.log(self._curves.points(record))

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Log `metrics.json` as the run's summary, its tables, and its figure."""
        import wandb

        self._exit_code = int(metrics["status"] != Status.DONE)
        self._run.summary.update(metrics)
        tables = content.tables(self._folder, metrics["status"], records)
        if "sweeps" in tables:
            for sweep, error in content.convergence(tables["sweeps"]).items():
                self._run.log({content.SWEEP: sweep, content.CONVERGENCE: error})
        media: dict[str, Any] = {
            f"tables/{name}": wandb.Table(list(table), table.to_numpy().tolist(), allow_mixed_types=True)
            for name, table in tables.items()
        }
        if records:
            media[content.LAYER_ERROR_FIGURE] = wandb.Image(pixels(layer_error_figure(records)))
        if media:
            self._run.log(media)

    def close(self) -> None:
        """End the run, as failed unless it is known to have gone well."""
        self._run.finish(exit_code=self._exit_code)


def start(settings: Settings) -> Any:
    """Start the W&B run of one cell."""
    os.environ["WANDB_DATA_DIR"] = data_folder(settings.study_folder)
    import wandb

    mode = settings.execution.tracker.mode or ("online" if logged_in() else "offline")
    settings.study_folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "project": settings.execution.tracker.project,
        "entity": settings.execution.tracker.entity,
        "id": content.run_id(settings.run_name, settings.execution.study),  # the same if it is run again, to replace it
        "name": content.title(settings),
        "group": settings.execution.study,
        "job_type": content.job_type(settings),
        "tags": content.tags(settings),
        "config": content.config(settings),
        "dir": str(settings.study_folder),
        "settings": wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT, console="off"),
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", **options)
        except wandb.Error as error:
            where = settings.study_folder / "wandb"
            log.warning("W&B does not answer (%s): tracking offline into %s", str(error).split("\n")[0], where)
    return wandb.init(mode="offline", **options)


def data_folder(study_folder: Path) -> str:
    """The folder in which W&B keeps the files of tables until they are sent: with the runs, not in the user's home."""
    return str((study_folder / "wandb" / "data").absolute())


def logged_in() -> bool:
    """Whether W&B has credentials and is allowed to use them; never asks for any."""
    if os.environ.get("WANDB_MODE") in OFFLINE:
        return False
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error:
        return False

"""One W&B run per cell: online if the user is logged in and the server answers, else offline into the study's folder.

The offline runs of a study are all in `results/<study>/wandb/`, where W&B's own viewer, `wandb leet`, shows them together;
`python -m runners.sync` sends them.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any

from runners.config.settings import Settings
from runners.results.layers import LayerRecord
from runners.results.metrics import Status
from runners.tracking import content
from runners.tracking.figures import layer_error_figure, pixels
from runners.tracking.wandb_server import answers, is_disabled, logged_in

log = logging.getLogger(__name__)

# With the seconds that `answers` may take, a run is offline within 20 seconds, with room for a busy machine.
INIT_TIMEOUT = 8.0  # for a server that answers to take a run
FINISH_TIMEOUT = 120.0  # for a server to take the rest of a run when it ends; W&B would wait until it does


class WandbTracker:
    """One W&B run."""

    def __init__(self, run: Any, folder: Path, settings: Settings) -> None:
        self._run = run
        self._folder = folder
        self._curves = content.Curves()
        self._exit_code = 1  # until the run is known to have gone well
        offline = run.settings.mode == "offline"
        self.where: str | None = f"wandb leet {quote(str(settings.study_folder / 'wandb'))}" if offline else run.url
        run.define_metric(content.SWEEP, hidden=True)
        run.define_metric(content.CONVERGENCE, step_metric=content.SWEEP)

    def layer(self, record: LayerRecord) -> None:
        """Log one point per curve. W&B's own step is the block, as any other metric of steps would be a chart in leet."""
        self._run.log(self._curves.points(record), step=record.block)

    def finish(self, metrics: dict[str, Any], records: list[LayerRecord]) -> None:
        """Log `metrics.json` as the run's summary, its tables, and its figure."""
        import wandb

        self._exit_code = int(metrics["status"] != Status.DONE)
        self._run.summary.update(metrics)
        self._run.log(content.perplexities(metrics))
        tables = content.tables(self._folder, metrics["status"], records)
        if "sweeps" in tables:
            for sweep, error in content.convergence(tables["sweeps"]).items():
                self._run.log({content.SWEEP: sweep, content.CONVERGENCE: error})
        media: dict[str, Any] = {
            f"tables/{name}": wandb.Table(list(table), table.to_numpy().tolist(), allow_mixed_types=True)
            for name, table in tables.items()
        }
        if any(record.relative_error is not None for record in records):
            media[content.LAYER_ERROR_FIGURE] = wandb.Image(pixels(layer_error_figure(records)))
        if media:
            self._run.log(media)

    def close(self) -> None:
        """End the run, as failed unless it is known to have gone well.

        Raises:
            TimeoutError: the server has not taken all of it. The rest is on disk.
        """
        try:
            self._run.finish(exit_code=self._exit_code)
        except TimeoutError as error:
            folder = quote(str(self._run.settings.sync_dir))
            raise TimeoutError(f"W&B has not taken all of the run: send the rest with wandb sync {folder}") from error
        if self._run.settings.mode == "offline":
            _wait_for_disk()


def start(settings: Settings) -> Any | None:
    """Start the W&B run of one cell; None if the user has disabled W&B.

    Raises:
        Exception: whatever W&B raises when it cannot even write a run to the study's folder.
    """
    _set_folders(settings.study_folder)
    if is_disabled():
        return None
    settings.study_folder.mkdir(parents=True, exist_ok=True)
    attempts = ["offline", "offline"]  # the second for a machine so busy that W&B's own process does not answer in time
    if settings.execution.tracker.mode == "online" or (settings.execution.tracker.mode is None and logged_in()):
        if answers():
            attempts = ["online", *attempts]
        else:
            _warn_offline(settings, "no answer from its server")
    for attempt, mode in enumerate(attempts[:-1]):
        try:
            return _start(settings, mode, attempt)
        except Exception as error:  # of many classes, some of which W&B keeps to itself
            _warn_offline(settings, str(error).split("\n")[0])
    return _start(settings, attempts[-1], len(attempts) - 1)


def _set_folders(study_folder: Path) -> None:
    os.environ["WANDB_DATA_DIR"] = data_folder(study_folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path(os.environ.get("HOME", "/")) / ".cache")
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not os.access(existing, os.W_OK):  # W&B would say so in the terminal, and show its log there
        os.environ.setdefault("WANDB_CACHE_DIR", data_folder(study_folder))


def _warn_offline(settings: Settings, reason: str) -> None:
    log.warning("W&B does not answer (%s): tracking offline into %s", reason, settings.study_folder / "wandb")


def _start(settings: Settings, mode: Any, attempt: int) -> Any:
    import wandb

    run_id = content.run_id(settings.run_name, settings.execution.study)
    options: dict[str, Any] = {"silent": True, "console": "off"}
    if mode == "online":
        options |= {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT, "finish_timeout_raises": True}
    return wandb.init(
        mode=mode,
        project=settings.execution.tracker.project,
        entity=settings.execution.tracker.entity,
        id=content.attempt_id(run_id, attempt),  # the same if it is run again, to replace it
        name=content.cut(content.title(settings), content.LONGEST_NAME),
        group=settings.execution.study,
        job_type=content.job_type(settings),
        tags=content.tags(settings),
        config=content.config(settings),
        dir=str(settings.study_folder),
        reinit="create_new",  # a run that could not be closed is not taken for this one
        settings=wandb.Settings(**options),
    )


def _wait_for_disk() -> None:
    """Let W&B's own process end, and so write what it holds: a run that is finished may not be on disk for a while yet, and
    that process is stopped without ceremony when the cell's process is gone."""
    import wandb

    with suppress(SystemExit):  # with which W&B passes on how that process has ended
        wandb.teardown()


def data_folder(study_folder: Path) -> str:
    """The folder in which W&B keeps the files of tables until they are sent: with the runs, not in the user's home."""
    return str((study_folder / "wandb" / "data").absolute())

"""One run: preflight, calibration, quantization, evaluation, results. And the unquantized run it is compared with."""

import logging
import traceback
from typing import Any

import torch

from quantease.layer import Unsupported
from runners.config.settings import Settings
from runners.errors import InputError
from runners.quantization.finished_blocks import delete_finished_blocks
from runners.results.layers import LayerRecord, refuse_warnings
from runners.results.metrics import METRICS, MODEL_PATH
from runners.results.progress import Progress, owner_words, read_progress, remove_progress
from runners.results.run_folder import RunFolder
from runners.run.preflight import Inputs, preflight, run_environment
from runners.run.stages import Work
from runners.storage.files import check_writable
from runners.tracking import Tracker, track

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted {where}: the same command again goes on with it"


def run_experiment(settings: Settings) -> list[dict[str, Any]]:
    """Run what the settings ask for and, where it quantizes, the reference it is compared with.

    Returns:
        Their rows, reference first: the metrics, and under `folder` and `tracker` where to find them.
    """
    row = run_cell(settings)
    if not settings.run.quantizes or row["status"] in ("failed", "running"):
        return [row]
    return [run_cell(settings.reference(), is_asked_for=False), row]


def run_cell(settings: Settings, is_asked_for: bool = True) -> dict[str, Any]:
    """One cell of a study. Whatever happens in it becomes its row; only an interrupt gets out, after that.

    Where another process works on the same cell, a row of status `running` comes back at once; a cell that is not
    `is_asked_for`, but needed for a table, is waited for.

    Raises:
        InputError: the run's folder cannot be read or written, so there is nowhere to put a row.
    """
    folder = RunFolder(settings.folder)
    if (ended := folder.metrics_to_keep(settings.execution.force, settings.execution.retry_failed)) is not None:
        return _on_disk(settings, ended, is_asked_for)
    check_writable(folder.path)
    if not is_asked_for and folder.is_running():
        log.info("waiting for %s: %s works on it", settings.run_name, owner_words(read_progress(folder.path)))
    with folder.lock(wait=not is_asked_for) as mine:
        if not mine:
            error = f"{owner_words(read_progress(folder.path))}, works on it"
            return _labels(settings) | {"status": "running", "error": error, "folder": str(folder.path)}
        if (
            ended := folder.metrics_to_keep(settings.execution.force, settings.execution.retry_failed)
        ) is not None:  # by who held it until now
            return _on_disk(settings, ended, is_asked_for)
        folder.clear_result()
        return _run(settings, folder)


def _on_disk(settings: Settings, row: dict[str, Any], is_asked_for: bool) -> dict[str, Any]:
    how = "failed before (retry_failed=true" if row["status"] == "failed" else "is already done (force=true"
    level = logging.INFO if is_asked_for else logging.DEBUG
    log.log(level, "%s %s runs it again): %s", settings.run_name, how, settings.folder)
    return row | {"folder": str(settings.folder), "tracker": None, "skipped": True}


def _run(settings: Settings, folder: RunFolder) -> dict[str, Any]:
    state, interrupt = Progress(folder.path), None
    with track(settings, folder.path) as tracker:
        try:
            with state.follow_bars():
                metrics = _measure(settings, folder, state, tracker)
        except Exception as error:
            metrics = _failure(error, state)
        except KeyboardInterrupt as error:
            interrupt = error
            metrics = failure_metrics(settings, "interrupted", state.stage, INTERRUPTED.format(where=state.words()))
        metrics = _labels(settings) | metrics
        tracker.finish(metrics, state.records)
    folder.write_json(METRICS, metrics)
    if metrics["status"] == "done" and not settings.execution.keep_checkpoint:
        delete_finished_blocks(folder.path)  # not before the row is there: who is killed in between has lost nothing
    remove_progress(folder.path)
    if interrupt is not None:
        raise interrupt
    return metrics | {"folder": str(folder.path), "tracker": tracker.where}


def _measure(settings: Settings, folder: RunFolder, state: Progress, tracker: Tracker) -> dict[str, Any]:
    state.stage = "preflight"
    folder.write_config(settings.resolved())
    inputs = preflight(settings)
    folder.write_json("environment.json", run_environment(inputs))
    log.info("%s", _headline(settings, inputs))
    state.stage = "load"
    torch.manual_seed(settings.run.seed)
    work = Work.begin(settings, inputs, folder.path)
    state.stage = "quantize"

    def report(record: LayerRecord) -> None:
        state.records.append(record)
        tracker.layer(record)
        if settings.run.warnings == "error":
            refuse_warnings(record)

    metrics: dict[str, Any] = {"status": "done", "parameters": inputs.checkpoint.parameters}
    try:
        metrics |= work.quantize(report)
    finally:
        if state.records:  # of a run that fails, too: its last rows say how far it came
            folder.write_layers(state.records)
    state.stage = "evaluate"
    evaluated, windows = work.evaluate()
    folder.write_windows(windows)
    state.stage = "zero-shot"
    return metrics | evaluated | work.zero_shot() | work.recorded()


def _headline(settings: Settings, inputs: Inputs) -> str:
    what = "measuring the unquantized model"
    if settings.run.quantizes:
        columns = "per-channel" if settings.run.group_size is None else f"in groups of {settings.run.group_size}"
        what = f"quantizing to {settings.run.bits} bits, {columns}, with {settings.run.method.name}"
    size = f"{inputs.checkpoint.parameters / 1e6:,.1f} M parameters"
    return f"{settings.run.model.name} ({type(inputs.checkpoint.skeleton).__name__}, {size}) on {inputs.device}: {what}"


def _labels(settings: Settings) -> dict[str, Any]:
    """What a table needs to know about a run, beside its numbers."""
    labels: dict[str, Any] = {
        "method": settings.run.method.name,
        "model": settings.run.model.name,
        MODEL_PATH: settings.run.model_path,
        "study": settings.execution.study,
        "digest": settings.digest,
        "series": settings.series,
    }
    if settings.run.quantizes:
        names = ("bits", "group_size", "symmetric", "grid_range", "act_order", "seed")
        labels |= {name: getattr(settings.run, name) for name in names}
        labels |= {"calibration": settings.run.calibration.name, "calibration_inputs": settings.run.calibration.inputs}
    return labels


def _failure(error: Exception, state: Progress) -> dict[str, Any]:
    if isinstance(error, Unsupported):
        status: dict[str, Any] = {"status": "unsupported"}
    else:
        status = {"status": "failed", "reason": "exception"}
    if not isinstance(error, Unsupported | InputError):
        log.debug("", exc_info=error)
    return status | {
        "stage": state.stage,
        "error": str(error) if isinstance(error, Unsupported | InputError) else f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def failure_metrics(settings: Settings, reason: str, stage: str, error: str) -> dict[str, Any]:
    """The row of a run that cannot write its own, because its process is gone."""
    return _labels(settings) | {"status": "failed", "reason": reason, "stage": stage, "error": error}

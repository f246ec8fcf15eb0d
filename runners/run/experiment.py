"""One run, from preflight to its metrics on disk, and the unquantized run that it is compared with."""

import dataclasses
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantease.layer import Unsupported
from runners.config.settings import Settings
from runners.errors import InputError, NoRoom
from runners.results.layers import LayerRecord, refuse_warnings, ruled_by_few_tokens
from runners.results.metrics import (
    CALIBRATION,
    CALIBRATION_INPUTS,
    CALIBRATION_NOTE,
    CHECKPOINT_FROM,
    COLUMN_ORDER,
    FALLBACK,
    GRID_FORMAT,
    MIXED,
    MODEL_DTYPE,
    MODEL_NOTE,
    MODEL_PATH,
    QUANTIZATION,
    RUN_SECONDS,
    TOKEN_WEIGHTS,
    TRANSFORM,
    UNCALIBRATED,
    WITHIN_GROUPS,
    Reason,
    Status,
    bits_words,
    bos_warning,
    group_words,
    tasks_without_memory,
)
from runners.results.progress import Progress, owner_words, read_progress
from runners.results.run_folder import RunFolder
from runners.results.run_log import run_log
from runners.run.environment import bug_report
from runners.run.kept_codes import alone_with, clear_leftovers, end_run, take_over
from runners.run.preflight import RunInputs, preflight, run_environment
from runners.run.stages import Stages
from runners.run.tasks_left import ZERO_SHOT, try_tasks_again
from runners.run.walk import walk_rounding
from runners.storage.files import check_writable, is_of_disk
from runners.tracking.tracker import RunTracker, track

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted {where}: the same command again goes on with it"


def run_experiment(settings: Settings, on_cell: Callable[[dict[str, Any]], None] | None = None) -> list[dict[str, Any]]:
    """Run the cell of these settings and, if there is one, the reference that it is compared with.

    The reference comes second, because a mistake in the settings should show at once, not after the reference's minutes.

    Args:
        on_cell: called with the cell's metrics when it is done and the reference, which takes its own time, is not yet.

    Returns:
        The metrics of both, reference first, with `folder` and `tracker`: where to find them.

    Raises:
        InputError: as for `run_cell`.
    """
    if not settings.run.is_compared:
        return [run_cell(settings)]
    reference = settings.reference()
    _is_open(reference)  # a damaged one is refused before the minutes of the cell
    metrics = run_cell(settings)
    if metrics["status"] in (Status.FAILED, Status.RUNNING):
        return [metrics]
    if on_cell is not None and metrics["status"] == Status.DONE and _is_open(reference):
        on_cell(metrics)
    # Where memory is short for the cell's own tasks, it is for the reference's: not every cell is to find that out again.
    is_short = bool(tasks_without_memory(metrics))
    return [run_cell(reference, is_asked_for=False, tries_tasks=not is_short), metrics]


def run_cell(settings: Settings, is_asked_for: bool = True, tries_tasks: bool = True) -> dict[str, Any]:
    """Run one cell of a study, unless its metrics are on disk.

    An exception becomes metrics with the status `failed`; only an interrupt is raised again, after its metrics are written.

    Args:
        is_asked_for: the user has named this cell. If another process works on it, metrics of the status `running` come back
            at once. A reference that only the table needs is waited for.
        tries_tasks: whether a run that is done but for zero-shot tasks that memory was short for tries these again.

    Raises:
        InputError: the run's folder cannot be read or written, so there is no place for metrics; or a finished run is to be
            run again with inputs that cannot work, and its result is kept.
    """
    folder = RunFolder(settings.folder)
    if (ended := _ended(settings, folder, tries_tasks)) is not None:
        clear_leftovers(folder)
        return _skip(settings, ended, is_asked_for)
    check_writable(folder.path)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not is_asked_for and folder.is_running():
        log.info("waiting for %s: %s works on it", settings.run_name, owner_words(read_progress(folder.path)))
    with folder.lock(wait=not is_asked_for) as is_mine:
        if not is_mine:
            error = f"{owner_words(read_progress(folder.path))}, works on it"
            return _labels(settings) | {"status": Status.RUNNING.value, "error": error, "folder": str(folder.path)}
        # Again, now under the lock: the process that held it until now may have ended the run.
        if (ended := _ended(settings, folder, tries_tasks)) is not None:
            return _skip(settings, ended, is_asked_for)
        if (done := _done_but_for_tasks(settings, folder)) is not None:
            return try_tasks_again(settings, folder, done)
        # Checked before the result that stands is removed: force=true with a file that is gone must not cost it.
        inputs = preflight(settings) if _has_result(folder) else None
        folder.clear_result()
        return _run(settings, folder, inputs)


def _is_open(settings: Settings) -> bool:
    """Whether a cell is still to be run."""
    execution = settings.execution
    return RunFolder(settings.folder).metrics_to_keep(execution.force, execution.retry_failed) is None


def _ended(settings: Settings, folder: RunFolder, tries_tasks: bool) -> dict[str, Any] | None:
    """The metrics of a run of which nothing is to be run; None where something is."""
    kept = folder.metrics_to_keep(settings.execution.force, settings.execution.retry_failed)
    return _done_but_for_tasks(settings, folder) if kept is None and not tries_tasks else kept


def _done_but_for_tasks(settings: Settings, folder: RunFolder) -> dict[str, Any] | None:
    metrics = None if settings.execution.force else folder.metrics()
    return metrics if metrics is not None and folder.tasks_left(metrics) else None


def _has_result(folder: RunFolder) -> bool:
    try:
        metrics = folder.metrics()
    except InputError:  # damaged: nothing to keep
        return False
    return metrics is not None and metrics["status"] == Status.DONE


def _skip(settings: Settings, metrics: dict[str, Any], is_asked_for: bool) -> dict[str, Any]:
    has_failed = metrics["status"] == Status.FAILED
    how = "failed before (retry_failed=true" if has_failed else "is already done (force=true"
    level = logging.INFO if is_asked_for else logging.DEBUG
    log.log(level, "%s %s runs it again): %s", settings.run_name, how, settings.folder)
    return metrics | {"folder": str(settings.folder), "tracker": None, "skipped": True}


def _run(settings: Settings, folder: RunFolder, inputs: RunInputs | None) -> dict[str, Any]:
    """Run under the run's lock, and write what came of it.

    Args:
        inputs: None if they are still to be checked; what is wrong with them is then recorded.
    """
    progress, interrupt, start = Progress(folder.path), None, time.monotonic()
    with run_log(folder.path) as add, track(settings, folder.path) as tracker:
        add(f"begins    {settings.run_name} of study {settings.execution.study}\n{bug_report()}")
        try:
            with progress.follow_bars():
                metrics = _measure(settings, folder, inputs, progress, tracker)
                metrics[RUN_SECONDS] = time.monotonic() - start
        except Exception as error:
            metrics = _interruption(settings, error, progress) or _failure(error, progress)
        except KeyboardInterrupt as raised:  # held back until everything is written
            interrupt = raised
            error = INTERRUPTED.format(where=progress.words())
            metrics = failure_metrics(settings, Reason.INTERRUPTED, progress.stage, error)
        metrics = _labels(settings) | metrics
        add(_last_lines(metrics))
        tracker.finish(metrics, progress.records)
    end_run(settings, folder, metrics, progress)
    if interrupt is not None:
        raise interrupt
    return metrics | {"folder": str(folder.path), "tracker": tracker.where}


def _measure(
    settings: Settings, folder: RunFolder, inputs: RunInputs | None, progress: Progress, tracker: RunTracker
) -> dict[str, Any]:
    """Go through the stages of a run; writes every file of its folder but the metrics, which are returned."""
    progress.stage = "preflight"
    folder.write_config(settings.resolved())
    inputs = inputs or preflight(settings)
    environment = run_environment(inputs)
    folder.write_json("environment.json", environment)
    log.info("%s", _headline(settings, inputs))
    for note in inputs.sequences.notes if inputs.sequences else ():
        log.warning("%s", note)
    progress.stage = "load"
    torch.manual_seed(settings.run.seed)
    stages = Stages.open(settings, inputs, folder.path)
    if (rounding := walk_rounding(settings, inputs, stages.source)) is not None:
        folder.write_json("environment.json", environment | {"walk": dataclasses.asdict(rounding)})
    progress.stage = "quantize"

    def on_layer(record: LayerRecord) -> None:
        progress.records.append(record)
        tracker.layer(record)
        if settings.run.warnings == "error":  # after the record is kept: it is the one to look at
            refuse_warnings(record)

    metrics: dict[str, Any] = {"status": Status.DONE.value} | _model_facts(stages) | _calibration_note(settings)
    try:
        metrics |= _quantize(settings, stages, on_layer)
    finally:
        if progress.records:  # also of a run that fails: the last rows show how far it came
            folder.write_layers(progress.records)
    if warning := _tokens_warning(settings, progress.records):
        log.warning("%s", warning)
    progress.stage = "evaluate"
    evaluated, windows = stages.evaluate()
    if warning := bos_warning(evaluated):
        log.warning("%s", warning)
    folder.write_windows(windows)
    progress.stage = ZERO_SHOT
    return metrics | evaluated | stages.zero_shot() | stages.resources()


def _quantize(settings: Settings, stages: Stages, on_layer: Callable[[LayerRecord], None]) -> dict[str, Any]:
    """Quantize, or take over what another run of the same quantization has finished."""
    if stages.blocks is None:
        return stages.quantize(on_layer)
    with alone_with(settings):
        source = None if settings.execution.force else take_over(settings, stages.blocks.identity)
        if source is not None:
            log.info("taking over the codes of %s", source)
        return stages.quantize(on_layer) | ({} if source is None else {CHECKPOINT_FROM: source})


def _tokens_warning(settings: Settings, records: list[LayerRecord]) -> str | None:
    calibration = settings.run.calibration
    return None if calibration is None or calibration.scales_tokens else ruled_by_few_tokens(records)


def _model_facts(stages: Stages) -> dict[str, Any]:
    """What the model is: its size, the dtype of its weights, and what must be said of it."""
    checkpoint = stages.inputs.checkpoint
    dtype = str(stages.source.model.dtype).removeprefix("torch.")
    has_note = checkpoint.note and not stages.settings.run.is_stored  # else its grid is what is measured
    note = {MODEL_NOTE: checkpoint.note} if has_note else {}
    return {"parameters": checkpoint.parameters, MODEL_DTYPE: dtype} | note


def _calibration_note(settings: Settings) -> dict[str, str]:
    """A sentence on the texts that are measured though they were calibrated on, which is also logged."""
    texts = settings.run.calibrated_on(settings.execution.data_root)
    if not texts:
        return {}
    are = "are" if len(texts) > 1 else "is"
    note = f"{', '.join(texts)} {are} what was calibrated on: perplexity and agreement there are too good"
    log.warning("%s", note)
    return {CALIBRATION_NOTE: note}


def _headline(settings: Settings, inputs: RunInputs) -> str:
    what = "measuring the model as it is stored" if settings.run.is_stored else "measuring the unquantized model"
    if settings.run.quantizes:
        kind = "" if settings.run.grid_format is None else f"{settings.run.grid_format.name}, "
        grid = f"{kind}{bits_words(settings.run.bits)}, {group_words(settings.run.group_size)}"
        what = f"quantizing to {grid}, with {settings.run.method.name}"
        what += "" if settings.run.transform is None else f" behind {settings.run.transform.name}"
        what += f" (layers: {settings.run.layer_words})" * settings.run.is_mixed
        what += ", without calibration" * (settings.run.calibration is None)
    size = f"{inputs.checkpoint.parameters / 1e6:,.1f} M parameters"
    return f"{settings.run.model.name} ({type(inputs.checkpoint.skeleton).__name__}, {size}) on {inputs.device}: {what}"


def _labels(settings: Settings) -> dict[str, Any]:
    """The labels of a run in its metrics: what tables and figures need besides the numbers."""
    labels: dict[str, Any] = {
        "method": settings.run.method.name,
        "model": settings.run.model.name,
        MODEL_PATH: settings.run.labeled_path,
        "study": settings.execution.study,
        "digest": settings.digest,
        "series": settings.series,
        QUANTIZATION: settings.quantization,
    }
    if settings.run.quantizes:
        names = ("bits", "group_size", "symmetric", "grid_range", "act_order", "seed")
        labels |= {name: getattr(settings.run, name) for name in names}
        labels["act_order"] = bool(settings.run.act_order)
        if settings.run.sorts_within_groups:
            labels[COLUMN_ORDER] = WITHIN_GROUPS
        if settings.run.transform is not None:
            labels[TRANSFORM] = settings.run.transform.name
        if settings.run.grid_format is not None:
            labels[GRID_FORMAT] = settings.run.grid_format.name
        if settings.run.is_mixed:  # `bits` are then those of most layers, until their mean is known
            labels[MIXED] = settings.run.layer_words
        calibration = settings.run.calibration
        labels[CALIBRATION] = UNCALIBRATED if calibration is None else calibration.name
        if calibration is not None:
            labels |= {CALIBRATION_INPUTS: calibration.inputs, TOKEN_WEIGHTS: calibration.token_weights}
            labels[FALLBACK] = settings.run.fallback
    return labels


def _last_lines(metrics: dict[str, Any]) -> str:
    """How a run ended, for its log."""
    why = f" during {metrics['stage']}: {metrics['error']}" if "error" in metrics else ""
    return f"{metrics.get('traceback', '')}ends      {metrics['status']}{why}"


def _interruption(settings: Settings, error: Exception, progress: Progress) -> dict[str, Any] | None:
    """The metrics of a run that a full or broken disk has stopped; None if the error is another."""
    if isinstance(error, NoRoom):
        return failure_metrics(settings, Reason.INTERRUPTED, progress.stage, str(error))
    if not is_of_disk(error):  # such as of a library that could not write its own files
        return None
    where = f" in {Path(error.filename).parent}" if isinstance(error, OSError) and error.filename else ""
    words = f"{type(error).__name__}: {error}: make room{where}, and the same command again goes on"
    return failure_metrics(settings, Reason.INTERRUPTED, progress.stage, words)


def _failure(error: Exception, progress: Progress) -> dict[str, Any]:
    status: dict[str, Any] = {"status": Status.FAILED.value, "reason": Reason.EXCEPTION.value}
    if isinstance(error, Unsupported):
        status = {"status": Status.UNSUPPORTED.value}
    is_a_sentence = isinstance(error, Unsupported | InputError)
    if not is_a_sentence:
        log.debug("", exc_info=error)
    return status | {
        "stage": progress.stage,
        "error": str(error) if is_a_sentence else f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }


def failure_metrics(settings: Settings, reason: Reason, stage: str, error: str) -> dict[str, Any]:
    """The metrics of a run that has not come to its end: it was interrupted, or its process is gone."""
    failure = {"status": Status.FAILED.value, "reason": reason.value, "stage": stage, "error": error}
    return _labels(settings) | failure

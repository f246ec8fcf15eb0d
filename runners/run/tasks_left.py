"""The zero-shot tasks that a run was short of memory for, tried again: all else of its result stands.

A run that is done but for them keeps its finished blocks, from which the whole quantized model is put together anew. The
blocks are those that the run was measured with (`checkpoint/sha256`); the machine and `batch_size` may be others, as it is
for these that one tries again. All tasks are then measured with one batch size: those of another are measured again, too.
"""

import dataclasses
import json
import logging
from typing import Any

from runners.config.settings import Settings
from runners.errors import InputError
from runners.models.blocks import decoder_blocks
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.layers import LayerRecord
from runners.results.metrics import (
    CHECKPOINT_SHA256,
    ZERO_SHOT_BATCH_SIZE,
    ZERO_SHOT_MEMORY,
    ZERO_SHOT_SECONDS,
    names,
    skipped,
    tasks_without_memory,
)
from runners.results.progress import Progress, remove_progress
from runners.results.run_folder import KEPT_BLOCKS, RunFolder
from runners.results.run_log import run_log
from runners.run.environment import bug_report
from runners.run.kept_codes import end_run
from runners.run.preflight import RunInputs, preflight
from runners.run.stages import Stages
from runners.tracking.tracker import track

ZERO_SHOT = "zero-shot"  # the last stage that measures

log = logging.getLogger(__name__)

Metrics = dict[str, Any]


def try_tasks_again(settings: Settings, folder: RunFolder, done: Metrics) -> Metrics:
    """Measure the tasks that are left of a run that is done, under its lock.

    Its result stands until the new one replaces it whole: whatever goes wrong is a warning.

    Returns:
        Its metrics, with `folder` and `tracker`.
    """
    progress = Progress(folder.path)
    progress.stage = ZERO_SHOT
    result, where = done, None
    try:
        with run_log(folder.path) as add, progress.follow_bars():
            add(f"goes on with the zero-shot tasks of {settings.run_name}\n{bug_report()}")
            metrics, records = measure_tasks_left(settings, folder, done)
        if tasks_without_memory(metrics) != tasks_without_memory(done):
            with track(settings, folder.path) as tracker:
                for record in records:
                    tracker.layer(record)
                tracker.finish(metrics, records)
            end_run(settings, folder, metrics, progress)
            result, where = metrics, tracker.where
    except Exception as error:
        log.warning("%s: the zero-shot tasks that are left were not measured: %s", settings.run_name, error)
    finally:
        remove_progress(folder.path)
    return result | {"folder": str(folder.path), "tracker": where}


def measure_tasks_left(settings: Settings, folder: RunFolder, ended: Metrics) -> tuple[Metrics, list[LayerRecord]]:
    """Measure the tasks that are left of a run that is done, under its lock.

    Args:
        ended: its metrics.

    Returns:
        Its metrics with the new numbers, and the records of its layers, for the tracker.

    Raises:
        InputError: the finished blocks are damaged or not those that the run was measured with.
    """
    inputs = preflight(settings)
    blocks = _kept_blocks(folder, ended, inputs) if settings.run.quantizes else None
    log.info("%s: trying again what memory was short for: %s", settings.run_name, _words(ended))
    stages = Stages.open(settings, _only_left(inputs, ended), folder.path)
    found = dataclasses.replace(stages, blocks=blocks).zero_shot()
    records = [record for manifest in blocks.manifests for record in manifest.records] if blocks is not None else []
    return merged(ended, found), records


def merged(ended: Metrics, found: Metrics) -> Metrics:
    """The metrics of a run with what was found for the tasks that were left; those that failed again stay skipped.

    Seconds add up and memory is the larger, except where every task was measured anew.
    """
    left = tasks_without_memory(ended)
    names_found = {*names(found, "skipped")}
    kept = {key: value for key, value in ended.items() if key not in map(skipped, left)}
    # What preflight finds missing today was there when the run was made, or is said there.
    new = {key: value for key, value in found.items() if key not in map(skipped, names_found - {*left})}
    if ended.get(ZERO_SHOT_BATCH_SIZE) == found[ZERO_SHOT_BATCH_SIZE]:
        new[ZERO_SHOT_SECONDS] += ended.get(ZERO_SHOT_SECONDS, 0.0)
        new[ZERO_SHOT_MEMORY] = max(new[ZERO_SHOT_MEMORY], ended.get(ZERO_SHOT_MEMORY, 0.0))
    return kept | new


def _only_left(inputs: RunInputs, ended: Metrics) -> RunInputs:
    """The inputs without the tasks that need not be measured again."""
    if ended.get(ZERO_SHOT_BATCH_SIZE) != inputs.batch_size:
        return inputs
    left = tasks_without_memory(ended)
    return dataclasses.replace(inputs, tasks=[task for task in inputs.tasks if task.name in left])


def _kept_blocks(folder: RunFolder, ended: Metrics, inputs: RunInputs) -> FinishedBlocks:
    file = folder.path / KEPT_BLOCKS
    try:
        blocks = FinishedBlocks(folder.path, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}): run it again with force=true") from error
    count = len(decoder_blocks(inputs.checkpoint.skeleton))
    if blocks.resume(any_version=True) != count or blocks.sha256 != ended[CHECKPOINT_SHA256]:
        raise InputError(
            f"the weights in {blocks.folder} are not those that the run was measured with: run it again with force=true"
        )
    return blocks


def _words(ended: Metrics) -> str:
    return ", ".join(tasks_without_memory(ended))

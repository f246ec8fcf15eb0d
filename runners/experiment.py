"""One run: preflight, calibration, quantization, evaluation, results. And the unquantized run it is compared with."""

import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from quantease.layer import Unsupported
from runners.blocks import Source, linear_layers
from runners.cache import Cache
from runners.console import progress
from runners.errors import InputError
from runners.evaluation import Evaluation, SharedActivations
from runners.identity import model_key, resume_identity, statistics_key
from runners.memory import Memory, out_of_memory
from runners.meter import Meter, Phases
from runners.perplexity import perplexity
from runners.preflight import Inputs, preflight, run_environment
from runners.quantization import Plan, Quantization
from runners.records import LayerRecord, refuse_warnings, summary
from runners.resume import FinishedBlocks
from runners.settings import Settings
from runners.statistics import SharedStatistics
from runners.store import METRICS, RunFolder, check_writable
from runners.streaming import open_model, whole_model
from runners.tracking import Tracker, track
from runners.zero_shot import measure_tasks

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come: for the row of one that fails, and for its table of layers."""

    stage: str = "start"
    records: list[LayerRecord] = field(default_factory=list)


def run_experiment(settings: Settings) -> list[dict[str, Any]]:
    """Run what the settings ask for and, where it quantizes, the reference it is compared with.

    Returns:
        Their rows, reference first: the metrics, and under `folder` and `tracker` where to find them.
    """
    row = run_cell(settings)
    if not settings.quantizes or row["status"] == "failed":
        return [row]
    return [run_cell(settings.reference(), is_asked_for=False), row]


def run_cell(settings: Settings, is_asked_for: bool = True) -> dict[str, Any]:
    """One cell of a study. Whatever happens in it becomes its row; only the user's interrupt gets out.

    Raises:
        InputError: the run's folder cannot be read or written, so there is nowhere to put a row.
    """
    folder = RunFolder(settings.folder)
    if not settings.force and folder.finished():
        level = logging.INFO if is_asked_for else logging.DEBUG
        log.log(level, "%s is already done (force=true runs it again): %s", settings.run_name, folder.path)
        return (folder.metrics() or {}) | {"folder": str(folder.path), "tracker": None}
    check_writable(folder.path)
    folder.clear()
    state = Progress()
    with track(settings, folder.path) as tracker:
        try:
            metrics = _measure(settings, folder, state, tracker)
        except Exception as error:
            metrics = _failure(error, state)
        metrics = _labels(settings) | metrics
        tracker.finish(metrics, state.records)
    folder.write_json(METRICS, metrics)
    return metrics | {"folder": str(folder.path), "tracker": tracker.where}


def _measure(settings: Settings, folder: RunFolder, state: Progress, tracker: Tracker) -> dict[str, Any]:
    state.stage = "preflight"
    folder.write_config(settings.resolved())
    inputs = preflight(settings)
    folder.write_json("environment.json", run_environment(inputs))
    log.info("%s", _headline(settings, inputs))
    state.stage = "load"
    torch.manual_seed(settings.seed)
    source = open_model(inputs.checkpoint, settings.model, inputs.device)
    cache = Cache(None if settings.cache is None else Path(settings.cache), settings.cache_gb)
    blocks = FinishedBlocks(folder.path, resume_identity(settings, inputs)) if settings.quantizes else None
    if blocks is not None and settings.force:
        blocks.discard()
    memory = Memory()
    metrics: dict[str, Any] = {"status": "done", "parameters": inputs.checkpoint.parameters}
    state.stage = "quantize"
    try:
        metrics |= _quantize(source, settings, inputs, blocks, cache, memory, state, tracker)
    finally:
        if state.records:  # of a run that fails, too: its last rows say how far it came
            folder.write_layers(state.records)
    state.stage = "evaluate"
    metrics |= _evaluate(source, settings, inputs, blocks, cache, memory, folder)
    metrics |= _zero_shot(settings, inputs, blocks)
    metrics |= {"cache/hits": cache.hits, "cache/misses": cache.misses}
    if memory.steps:
        metrics["memory/steps"] = "; ".join(memory.steps)
    if blocks is not None and not settings.keep_checkpoint:
        blocks.discard()
    return metrics


def _headline(settings: Settings, inputs: Inputs) -> str:
    what = "measuring the unquantized model"
    if settings.quantizes:
        columns = "per-channel" if settings.group_size is None else f"in groups of {settings.group_size}"
        what = f"quantizing to {settings.bits} bits, {columns}, with {settings.method.name}"
    size = f"{inputs.checkpoint.parameters / 1e6:,.1f} M parameters"
    return f"{settings.model.name} ({type(inputs.checkpoint.skeleton).__name__}, {size}) on {inputs.device}: {what}"


def _quantize(
    source: Source,
    settings: Settings,
    inputs: Inputs,
    blocks: FinishedBlocks | None,
    cache: Cache,
    memory: Memory,
    state: Progress,
    tracker: Tracker,
) -> dict[str, Any]:
    stored_bits = inputs.checkpoint.stored_bits
    if inputs.sequences is None or blocks is None:
        nothing = ("layers/mean_relative_error", "quantize/seconds", "quantize/peak_memory_gb", "outlier_ratio")
        return dict.fromkeys(nothing, 0.0) | {"bits_per_weight": stored_bits, "bits_per_parameter": stored_bits}
    total = sum(len(linear_layers(block)) for block in source.blocks)
    full_precision = settings.calibration.inputs == "full_precision"
    plan = Plan(settings.solver, settings.grid, settings.calibration.true_sequential, full_precision, stored_bits)
    quantization = Quantization(
        source,
        inputs.sequences.used,
        plan,
        batch_size=inputs.batch_size,
        held_out=inputs.sequences.held_out,
        blocks=blocks,
        shared=SharedStatistics(cache, statistics_key(settings, inputs), inputs.device),
        memory=memory,
        phases=(phases := Phases(inputs.device)),
    )
    with Meter(inputs.device) as meter, progress("calibrating", total) as step:

        def report(record: LayerRecord) -> None:
            state.records.append(record)
            tracker.layer(record)
            if settings.warnings == "error":
                refuse_warnings(record)
            step(f"block {record.block + 1}/{len(source.blocks)}  {record.layer}")

        quantization.run(report)
    return summary(state.records, inputs.checkpoint.parameters, stored_bits) | {
        "quantize/seconds": sum(phases.seconds.values()),
        "quantize/peak_memory_gb": meter.peak_memory_gb,
        **{f"quantize/{name}_seconds": seconds for name, seconds in phases.seconds.items()},
        "calibration/sha256": inputs.sequences.sha256,
        "checkpoint/sha256": blocks.sha256,
    }


def _evaluate(
    source: Source,
    settings: Settings,
    inputs: Inputs,
    blocks: FinishedBlocks | None,
    cache: Cache,
    memory: Memory,
    folder: RunFolder,
) -> dict[str, Any]:
    texts = {name: (windows.ids, windows.sha256) for name, windows in inputs.windows.items()}
    shared = SharedActivations(cache, model_key(settings, inputs)) if settings.evaluation.agreement else None
    batch_size = inputs.batch_size
    with Meter(inputs.device) as meter, progress("evaluating", len(source.blocks) + len(texts)) as step:
        measured = Evaluation(source, texts, batch_size, blocks=blocks, shared=shared, memory=memory).run(step)
    folder.write_windows(measured)
    metrics: dict[str, Any] = {}
    for name, windows in inputs.windows.items():
        metrics |= {
            f"ppl/{name}": perplexity(torch.tensor(measured[name]["nll"], dtype=torch.float64)),
            f"protocol/{name}": windows.protocol,
            f"windows/{name}": len(windows.ids),
            f"sha256/{name}": windows.sha256,
        }
        for measure in ("kl", "top1"):
            if values := measured[name].get(measure):
                metrics[f"agreement/{name}/{measure}"] = fmean(values)
    return metrics | {"evaluate/seconds": meter.seconds, "evaluate/peak_memory_gb": meter.peak_memory_gb}


def _zero_shot(settings: Settings, inputs: Inputs, blocks: FinishedBlocks | None) -> dict[str, Any]:
    """The accuracies, with the whole model in memory, and why what was skipped was."""
    skipped = {f"skipped/{name}": why for name, why in inputs.skipped.items()}
    if not inputs.tasks:
        return skipped
    with Meter(inputs.device) as meter:
        try:
            model = whole_model(inputs.checkpoint, settings.model, inputs.device, blocks)
            options: dict[str, Any] = {"length": inputs.checkpoint.sequence_length, "batch_size": inputs.batch_size}
            metrics = measure_tasks(model, inputs.tokenizer, inputs.tasks, limit=settings.evaluation.limit, **options)
        except Exception as error:
            if not out_of_memory(error):
                raise
            why = "lm-eval needs the whole model in memory, and memory ran out: take a larger machine or batch_size=1"
            metrics = {f"skipped/{task.name}": why for task in inputs.tasks}
    return metrics | skipped | {"zero_shot/seconds": meter.seconds}


def _labels(settings: Settings) -> dict[str, Any]:
    """What a table needs to know about a run, beside its numbers."""
    labels: dict[str, Any] = {
        "method": settings.method.name,
        "model": settings.model.name,
        "study": settings.study,
        "digest": settings.digest,
        "series": settings.series,
    }
    if settings.quantizes:
        names = ("bits", "group_size", "symmetric", "grid_range", "act_order", "seed")
        labels |= {name: getattr(settings, name) for name in names}
        labels |= {"calibration": settings.calibration.name, "calibration_inputs": settings.calibration.inputs}
    return labels


def _failure(error: Exception, state: Progress) -> dict[str, Any]:
    unsupported = isinstance(error, Unsupported)
    if not isinstance(error, Unsupported | InputError):
        log.debug("", exc_info=error)
    return {
        "status": "unsupported" if unsupported else "failed",
        "stage": state.stage,
        "error": str(error) if isinstance(error, Unsupported | InputError) else f"{type(error).__name__}: {error}",
        "traceback": "".join(traceback.format_exception(error)),
    }

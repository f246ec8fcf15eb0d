"""One run: preflight, calibration, quantization, evaluation, results. And the unquantized run it is compared with."""

import logging
import platform
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from quantease.layer import Unsupported
from runners.blocks import Source, linear_layers
from runners.cache import Cache
from runners.calibration import Sequences, draw_sequences, ids_hash
from runners.console import progress
from runners.errors import InputError
from runners.evaluation import Evaluation, SharedActivations
from runners.fingerprint import checkpoint_fingerprint, code_fingerprint
from runners.memory import Memory
from runners.meter import Meter, Phases, environment
from runners.models import Checkpoint, check_divisibility, load_tokenizer, open_checkpoint
from runners.perplexity import Windows, cut_windows, perplexity
from runners.quantization import Plan, Quantization
from runners.records import LayerRecord, refuse_warnings, summary
from runners.resume import FinishedBlocks
from runners.settings import Settings
from runners.statistics import SharedStatistics
from runners.store import METRICS, RunFolder, check_writable
from runners.streaming import open_model
from runners.tracking import Tracker, track

log = logging.getLogger(__name__)

BATCH_TOKENS = {
    "cpu": 2048,
    "cuda": 16_384,
}  # that go through the model at once: what the caches hold, what keeps it busy
BLOCK_SHARE = 0.2  # of the GPU's memory that a batch may take inside a block
BLOCK_WIDTHS = 16  # that it takes, times the width of the model, a token: the block's inner activations


@dataclass
class Progress:
    """How far a run has come: for the row of one that fails, and for its table of layers."""

    stage: str = "start"
    records: list[LayerRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """Everything that preflight has found to be in order."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    sequences: Sequences | None  # the calibration data
    windows: dict[str, Windows]


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
    inputs = _preflight(settings)
    folder.write_json("environment.json", _environment(inputs))
    log.info("%s", _headline(settings, inputs))
    state.stage = "load"
    torch.manual_seed(settings.seed)
    source = open_model(inputs.checkpoint, settings.model, inputs.device)
    cache = Cache(None if settings.cache is None else Path(settings.cache), settings.cache_gb)
    blocks = FinishedBlocks(folder.path, _resume_identity(settings, inputs)) if settings.quantizes else None
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
    metrics |= {"cache/hits": cache.hits, "cache/misses": cache.misses}
    if memory.steps:
        metrics["memory/steps"] = "; ".join(memory.steps)
    if blocks is not None and not settings.keep_checkpoint:
        blocks.discard()
    return metrics


def _preflight(settings: Settings) -> Inputs:
    """Check whatever can be checked before weights are loaded."""
    try:
        device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={settings.device} cannot be used: {str(error).splitlines()[0]}") from error
    checkpoint = open_checkpoint(settings.model)
    if settings.quantizes:
        check_divisibility(checkpoint, settings.grid)
    tokenizer = load_tokenizer(checkpoint)
    length = checkpoint.sequence_length
    windows = {
        name: cut_windows(name, text, tokenizer, length, settings.data_root)
        for name, text in settings.evaluation.texts.items()
    }
    sequences = None
    if settings.quantizes:
        sequences = draw_sequences(settings.calibration, tokenizer, length, settings.seed, settings.data_root)
    tokens = [text.ids for text in windows.values()] + ([] if sequences is None else [sequences.used])
    _check_vocabulary(max((int(ids.max()) for ids in tokens), default=0), checkpoint)
    return Inputs(checkpoint, tokenizer, device, sequences, windows)


def _headline(settings: Settings, inputs: Inputs) -> str:
    what = "measuring the unquantized model"
    if settings.quantizes:
        columns = "per-channel" if settings.group_size is None else f"in groups of {settings.group_size}"
        what = f"quantizing to {settings.bits} bits, {columns}, with {settings.method.name}"
    size = f"{inputs.checkpoint.parameters / 1e6:,.1f} M parameters"
    return f"{settings.model.name} ({type(inputs.checkpoint.skeleton).__name__}, {size}) on {inputs.device}: {what}"


def _check_vocabulary(largest: int, checkpoint: Checkpoint) -> None:
    size = checkpoint.config.get_text_config().vocab_size
    if largest >= size:
        raise InputError(
            f"the tokenizer in {checkpoint.folder} makes the id {largest}, but the model has only {size}: they do not "
            "belong together"
        )


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
        batch_size=settings.batch_size or _batch_size(inputs),
        held_out=inputs.sequences.held_out,
        blocks=blocks,
        shared=SharedStatistics(cache, _statistics_key(settings, inputs), inputs.device),
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
    shared = SharedActivations(cache, _model_key(settings, inputs)) if settings.evaluation.agreement else None
    batch_size = settings.batch_size or _batch_size(inputs)
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


def _model_key(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """What the activations of the unquantized model depend on, beside the tokens."""
    machine = environment(inputs.device)
    return {
        "model": checkpoint_fingerprint(inputs.checkpoint.folder),
        "dtype": settings.model.dtype,
        "batch_size": settings.batch_size or _batch_size(inputs),
        "code": code_fingerprint("runners/blocks.py", "runners/streaming.py", "quantease/precision.py"),
        "versions": machine["versions"],
        "device": machine["device"],
    }


def _statistics_key(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    sequences = inputs.sequences
    held_out = None if sequences is None or sequences.held_out is None else ids_hash(sequences.held_out)
    return _model_key(settings, inputs) | {"ids": sequences and sequences.sha256, "held_out": held_out}


def _resume_identity(settings: Settings, inputs: Inputs) -> dict[str, Any]:
    """What must be the same for an unfinished run to go on; each name stands in the sentence that refuses."""
    key = _statistics_key(settings, inputs)
    return {
        "configuration": settings.identity(),
        "code version": code_fingerprint(),
        "library version": key["versions"] | {"python": platform.python_version()},
        "model": key["model"],
        "set of calibration sequences": [key["ids"], key["held_out"]],
        "device": key["device"],
        "batch_size": key["batch_size"],
    }


def _batch_size(inputs: Inputs) -> int:
    config = inputs.checkpoint.config.get_text_config()
    tokens = BATCH_TOKENS.get(inputs.device.type, 2048)
    if inputs.device.type == "cuda":  # all of its memory, not what is free: a run must find the same size again
        _, whole = torch.cuda.mem_get_info(inputs.device)
        tokens = min(tokens, BLOCK_SHARE * whole / (BLOCK_WIDTHS * config.hidden_size * 4))
    return max(1, int(tokens / inputs.checkpoint.sequence_length))


def _environment(inputs: Inputs) -> dict[str, Any]:
    texts = {
        name: {"sha256": windows.sha256, "tokens": windows.tokens, "windows": list(windows.ids.shape)}
        for name, windows in inputs.windows.items()
    }
    sequences = inputs.sequences
    return environment(inputs.device) | {
        "model_revision": inputs.checkpoint.revision,
        "sequence_length": inputs.checkpoint.sequence_length,
        "texts": texts,
        "calibration": None
        if sequences is None
        else {"sha256": sequences.sha256, "sequences": list(sequences.used.shape)},
    }


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

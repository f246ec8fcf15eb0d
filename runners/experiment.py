"""One run: preflight, calibration, quantization, evaluation, results. And the unquantized run it is compared with."""

import logging
import traceback
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantease.layer import Unsupported
from runners.blocks import decoder_blocks, linear_layers
from runners.calibration import draw_sequences, ids_hash
from runners.console import progress
from runners.errors import InputError
from runners.meter import Meter, Phases, environment
from runners.models import Checkpoint, check_divisibility, load, load_tokenizer, open_checkpoint
from runners.perplexity import Windows, cut_windows, perplexity, window_losses
from runners.progress import Progress, owner, read_progress, remove_progress
from runners.quantization import LayerRecord, quantize, refuse_warnings, summary
from runners.settings import Settings
from runners.store import METRICS, RunFolder, check_writable
from runners.tracking import Tracker, track

log = logging.getLogger(__name__)

BATCH_TOKENS = {
    "cpu": 2048,
    "cuda": 16_384,
}  # that go through the model at once: what the caches hold, what keeps it busy
BLOCK_SHARE = 0.25  # of the GPU's free memory that a batch may take inside a block
BLOCK_WIDTHS = 16  # that it takes, times the width of the model, a token: the block's inner activations
LOGITS_BYTES = 2e9  # that their logits may take, with the copies that the loss makes
INTERRUPTED = "interrupted {where}: the same command again goes on with it"


@dataclass(frozen=True)
class Inputs:
    """Everything that preflight has found to be in order."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    sequences: Tensor | None  # (sequences, length), the calibration data
    windows: dict[str, Windows]


def run_experiment(settings: Settings) -> list[dict[str, Any]]:
    """Run what the settings ask for and, where it quantizes, the reference it is compared with.

    Returns:
        Their rows, reference first: the metrics, and under `folder` and `tracker` where to find them.
    """
    row = run_cell(settings)
    if not settings.quantizes or row["status"] in ("failed", "running"):
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
    if (ended := folder.settled(settings.force, settings.retry_failed)) is not None:
        return _on_disk(settings, ended, is_asked_for)
    check_writable(folder.path)
    if not is_asked_for and folder.is_running():
        log.info("waiting for %s: %s works on it", settings.run_name, owner(read_progress(folder.path)))
    with folder.claim(wait=not is_asked_for) as mine:
        if not mine:
            error = f"{owner(read_progress(folder.path))}, works on it"
            return _labels(settings) | {"status": "running", "error": error, "folder": str(folder.path)}
        if (ended := folder.settled(settings.force, settings.retry_failed)) is not None:  # by who held it until now
            return _on_disk(settings, ended, is_asked_for)
        folder.clear()
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
            with state.watching():
                metrics = _measure(settings, folder, state, tracker)
        except Exception as error:
            metrics = _failure(error, state)
        except KeyboardInterrupt as error:
            interrupt = error
            metrics = failed_row(settings, "interrupted", state.stage, INTERRUPTED.format(where=state.where()))
        metrics = _labels(settings) | metrics
        tracker.finish(metrics, state.records)
    folder.write_json(METRICS, metrics)
    remove_progress(folder.path)
    if interrupt is not None:
        raise interrupt
    return metrics | {"folder": str(folder.path), "tracker": tracker.where}


def _measure(settings: Settings, folder: RunFolder, state: Progress, tracker: Tracker) -> dict[str, Any]:
    state.stage = "preflight"
    folder.write_config(settings.resolved())
    inputs = _preflight(settings)
    folder.write_json("environment.json", _environment(inputs))
    log.info("%s", _headline(settings, inputs))
    state.stage = "load"
    torch.manual_seed(settings.seed)
    model = load(inputs.checkpoint, settings.model, inputs.device)
    metrics: dict[str, Any] = {"status": "done", "parameters": inputs.checkpoint.parameters}
    state.stage = "quantize"
    try:
        metrics |= _quantize(model, settings, inputs, state, tracker)
    finally:
        if state.records:  # of a run that fails, too: its last rows say how far it came
            folder.write_layers(state.records)
    state.stage = "evaluate"
    metrics |= _evaluate(model, settings, inputs, folder)
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
    tokens = [text.ids for text in windows.values()] + ([] if sequences is None else [sequences])
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


def _quantize(model: Any, settings: Settings, inputs: Inputs, state: Progress, tracker: Tracker) -> dict[str, Any]:
    if inputs.sequences is None:
        nothing = ("layers/mean_relative_error", "quantize/seconds", "quantize/peak_memory_gb", "outlier_ratio")
        stored_bits = float(inputs.checkpoint.stored_bits)
        return dict.fromkeys(nothing, 0.0) | {"bits_per_weight": stored_bits, "bits_per_parameter": stored_bits}
    blocks = decoder_blocks(model)
    total = sum(len(linear_layers(block)) for block in blocks)
    phases = Phases(inputs.device)
    with Meter(inputs.device) as meter, progress("calibrating", total) as step:

        def report(record: LayerRecord) -> None:
            state.records.append(record)
            tracker.layer(record)
            if settings.warnings == "error":
                refuse_warnings(record)
            step(f"block {record.block + 1}/{len(blocks)}  {record.layer}")

        quantize(
            model,
            inputs.sequences,
            settings.solver,
            settings.grid,
            true_sequential=settings.calibration.true_sequential,
            batch_size=settings.batch_size or _batch_size(inputs),
            stored_bits=inputs.checkpoint.stored_bits,
            report=report,
            phases=phases,
        )
    return summary(state.records, inputs.checkpoint.parameters, inputs.checkpoint.stored_bits) | {
        "quantize/seconds": meter.seconds,
        "quantize/peak_memory_gb": meter.peak_memory_gb,
        **{f"quantize/{name}_seconds": seconds for name, seconds in phases.seconds.items()},
        "calibration/sha256": ids_hash(inputs.sequences),
    }


def _evaluate(model: Any, settings: Settings, inputs: Inputs, folder: RunFolder) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    batch_size = settings.batch_size or _batch_size(inputs)
    total = sum(-(-len(windows.ids) // batch_size) for windows in inputs.windows.values())
    with Meter(inputs.device) as meter, progress("evaluating", total) as step:
        for name, windows in inputs.windows.items():
            batches = []
            for batch in window_losses(model, windows.ids, batch_size):
                batches.append(batch)
                step(f"perplexity  {name}")
            every = torch.cat(batches)
            losses[name] = every.tolist()
            metrics |= {
                f"ppl/{name}": perplexity(every),
                f"protocol/{name}": windows.protocol,
                f"windows/{name}": len(windows.ids),
                f"sha256/{name}": windows.sha256,
            }
    folder.write_windows(losses)
    return metrics | {"evaluate/seconds": meter.seconds, "evaluate/peak_memory_gb": meter.peak_memory_gb}


def _batch_size(inputs: Inputs) -> int:
    config = inputs.checkpoint.config.get_text_config()
    tokens = min(BATCH_TOKENS.get(inputs.device.type, 2048), LOGITS_BYTES / (12 * config.vocab_size))
    if inputs.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(inputs.device)
        tokens = min(tokens, BLOCK_SHARE * free / (BLOCK_WIDTHS * config.hidden_size * 4))
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
        else {"sha256": ids_hash(sequences), "sequences": list(sequences.shape)},
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
        labels |= {name: getattr(settings, name) for name in names} | {"calibration": settings.calibration.name}
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


def failed_row(settings: Settings, reason: str, stage: str, error: str) -> dict[str, Any]:
    """The row of a run that cannot write its own, because its process is gone."""
    return _labels(settings) | {"status": "failed", "reason": reason, "stage": stage, "error": error}

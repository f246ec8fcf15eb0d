"""Everything that can be checked and fetched before weights are loaded, so that mistakes show within seconds."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from runners.config.settings import Settings
from runners.data.calibration import Sequences, draw_sequences
from runners.data.datasets import StandardLibrary
from runners.data.windows import Windows, cut_texts
from runners.errors import InputError
from runners.evaluation.prompts import check_prompts
from runners.evaluation.tasks import ReadyTask, prepare_tasks
from runners.models.blocks import check_coverage, decoder_blocks
from runners.models.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from runners.run.environment import environment
from runners.run.input_check import check_model
from runners.storage.cache import Cache

log = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}  # in a batch: what a CPU's caches hold, what keeps a GPU busy
BLOCK_SHARE = (
    0.2  # of the GPU's memory, for the activations inside a decoder block; the rest is for weights and Hessians
)
BLOCK_WIDTHS = 16  # floats per token inside a decoder block, in units of the model's width (an MLP alone has 4 to 8)


@dataclass(frozen=True)
class RunInputs:
    """The inputs of a run, which preflight has found to be in order."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    sequences: Sequences | None  # the calibration data; None: there is none
    windows: dict[str, Windows]
    tasks: list[ReadyTask]
    skipped: dict[str, str]  # texts and tasks that are not measured, with the reason: no data, or unusable prompts
    batch_size: int  # sequences that go through the model together
    original: Checkpoint | None = None  # the unquantized model that one quantized elsewhere is compared with


def preflight(settings: Settings) -> RunInputs:
    """Check whatever can be checked before weights are loaded.

    Raises:
        InputError: the first thing that is wrong.
    """
    device = open_device(settings.execution.device)
    checkpoint = open_checkpoint(settings.run.model, stored=settings.run.is_stored)
    if settings.run.quantizes:
        check_model(checkpoint.skeleton, settings.run)
        if (left := check_coverage(checkpoint.skeleton)) is not None:
            log.warning("%s", left)
    tokenizer = load_tokenizer(checkpoint)
    length = checkpoint.sequence_length
    model_type, data_root = checkpoint.config.model_type, settings.execution.data_root
    cache = open_cache(settings)
    windows, skipped = cut_texts(settings.run.evaluation, tokenizer, length, data_root, model_type, cache)
    tasks, missing = prepare_tasks(settings.run.evaluation.tasks, data_root)
    sequences, calibration, seed = None, settings.run.calibration, settings.run.seed
    if settings.run.quantizes and calibration is not None:
        sequences = draw_sequences(calibration, tokenizer, length, seed, data_root, model_type, cache)
    # After the sequences are drawn, because lm-eval adds a padding token to a tokenizer that has none.
    limit = settings.run.evaluation.limit
    prompts = check_prompts(tasks, tokenizer, checkpoint.config, length=length, limit=limit)
    tokens = [text.ids for text in windows.values()] + ([] if sequences is None else sequences.all)
    _check_vocabulary(max([prompts.largest_id, *(int(ids.max()) for ids in tokens)]), checkpoint)
    batch_size = settings.execution.batch_size or default_batch_size(checkpoint, device)
    skipped |= missing | prompts.skipped
    original = _original(settings, checkpoint, windows)
    return RunInputs(checkpoint, tokenizer, device, sequences, windows, prompts.tasks, skipped, batch_size, original)


def modules_of_texts(settings: Settings) -> list[str]:
    """Modules that, once imported, have at hand what a run of these settings would read anew: for a fork server."""
    run = settings.run
    texts = [text.dataset for text in run.evaluation.texts.values()]
    texts += [run.calibration.dataset] if run.calibration is not None else []
    reads = any(isinstance(dataset, StandardLibrary) for dataset in texts)
    return ["runners.data.stdlib_at_hand"] if reads else []


def open_cache(settings: Settings) -> Cache:
    """The cache that the runs of these settings share."""
    execution = settings.execution
    return Cache(None if execution.cache is None else Path(execution.cache), execution.cache_gb)


def _original(settings: Settings, checkpoint: Checkpoint, windows: dict[str, Windows]) -> Checkpoint | None:
    """The checkpoint that `reference` names, which must be of the same architecture and split texts into the same tokens."""
    if (model := settings.run.original) is None:
        return None
    original = open_checkpoint(model)
    theirs, ours = type(original.skeleton).__name__, type(checkpoint.skeleton).__name__
    sizes = [len(decoder_blocks(found.skeleton)) for found in (original, checkpoint)]
    if theirs != ours or sizes[0] != sizes[1]:
        raise InputError(
            f"reference={settings.run.reference} is a {theirs} of {sizes[0]} decoder blocks, and the model is a {ours} of "
            f"{sizes[1]}: it is not its original"
        )
    tokenizer, data_root = load_tokenizer(original), settings.execution.data_root
    length, model_type = checkpoint.sequence_length, original.config.model_type
    cut, _ = cut_texts(settings.run.evaluation, tokenizer, length, data_root, model_type)
    if unlike := [name for name, text in windows.items() if name not in cut or cut[name].sha256 != text.sha256]:
        raise InputError(
            f"reference={settings.run.reference} splits the text {unlike[0]} into other tokens than the model: their "
            "predictions cannot be compared"
        )
    return original


def open_device(name: str | None) -> torch.device:
    """The device of this name; None: a GPU where there is one.

    Raises:
        InputError: it cannot be used.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # Triton launches its kernels on the current device, not on that of a tensor
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device={name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_vocabulary(largest: int, checkpoint: Checkpoint) -> None:
    size = checkpoint.config.get_text_config().vocab_size
    if largest >= size:
        raise InputError(
            f"the tokenizer in {checkpoint.folder} makes the id {largest}, but the model has only {size}: they do not "
            "belong together"
        )


def default_batch_size(checkpoint: Checkpoint, device: torch.device) -> int:
    """The number of sequences that keep the device busy and fit into its memory."""
    tokens: float = BATCH_TOKENS.get(device.type, 2048)
    if device.type == "cuda":
        # Of all memory, not of what is free: the batch size changes last digits, so a resumed run must find the same one.
        _, whole = torch.cuda.mem_get_info(device)
        tokens = min(tokens, BLOCK_SHARE * whole / (BLOCK_WIDTHS * checkpoint.config.get_text_config().hidden_size * 4))
    return max(1, int(tokens / checkpoint.sequence_length))


def run_environment(inputs: RunInputs) -> dict[str, Any]:
    """The content of `environment.json`: the machine and its libraries, the model's revision, the hashes of the tokens."""
    texts = {
        name: {"sha256": windows.sha256, "tokens": windows.tokens, "windows": list(windows.ids.shape)}
        for name, windows in inputs.windows.items()
    }
    sequences = inputs.sequences
    return environment(inputs.device) | {
        "model_revision": inputs.checkpoint.revision,
        "sequence_length": inputs.checkpoint.sequence_length,
        "batch_size": inputs.batch_size,
        "texts": texts,
        "calibration": None
        if sequences is None
        else {"sha256": sequences.sha256, "sequences": list(sequences.used.shape)},
    }

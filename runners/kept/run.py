"""A finished run that has kept its quantized weights, opened to be measured again; whatever is not in order is refused."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runners.config.stored import StoredSettings, located, stored_settings
from runners.errors import InputError
from runners.models.blocks import decoder_blocks
from runners.models.checkpoint import Checkpoint, Model, open_checkpoint
from runners.quantization.finished_blocks import IDENTITY, FinishedBlocks
from runners.results.metrics import CHECKPOINT_SHA256, METRICS, MODEL_PATH, REFERENCE, Status
from runners.results.run_folder import RunFolder
from runners.storage.fingerprint import checkpoint_fingerprint, fingerprint

Records = dict[tuple[int, str], dict[str, str]]  # rows of layers.csv by block and layer


@dataclass(frozen=True)
class KeptRun:
    """A run, its quantized weights, and the model that it was made from.

    Attributes:
        model: with the place of its files.
        layers: the rows of the run's `layers.csv`.
    """

    metrics: dict[str, Any]
    settings: StoredSettings
    model: Model
    checkpoint: Checkpoint
    blocks: FinishedBlocks
    layers: Records


def open_run(folder: Path, model: str | None) -> KeptRun:
    """Open a run.

    Args:
        folder: of the run.
        model: where its model is; None: where the run had it, or where conf/model/ has it.

    Raises:
        InputError: there is no such run, it has not ended well, it does not quantize, it has not kept its weights, they are
            damaged, or the files of its model are not those that it was made from.
    """
    folder = folder.resolve()  # the last part of its name must be the run's, which `.` is not
    metrics = _metrics(folder)
    blocks = _finished_blocks(folder)
    settings = stored_settings(folder)
    place = located(settings.model, model)
    checkpoint = open_checkpoint(place)
    _refuse_another_model(place, checkpoint, blocks, metrics)
    count = len(decoder_blocks(checkpoint.skeleton))
    if blocks.resume(any_version=True) != count or blocks.sha256 != metrics[CHECKPOINT_SHA256]:
        raise InputError(
            f"the weights in {blocks.folder} are not those that the run was measured with: one of the {count} blocks is "
            "missing, damaged or of another run. Run it again with keep_checkpoint=always force=true"
        )
    return KeptRun(metrics, settings, place, checkpoint, blocks, _records(folder))


def _metrics(folder: Path) -> dict[str, Any]:
    if not (folder / "config.yaml").is_file():
        raise InputError(
            f"there is no run in {folder}: name the folder of a run, which is results/STUDY/MODEL/METHOD-BITSb-DIGEST"
        )
    metrics = RunFolder(folder).metrics()
    if metrics is None:
        raise InputError(
            f"the run in {folder} is not finished, there is no {METRICS}: the command that started it goes on"
        )
    if metrics["status"] != Status.DONE:
        raise InputError(
            f"the run in {folder} is {metrics['status']} ({metrics['error']}): only a run that is done has a loss"
        )
    if metrics["method"] == REFERENCE:
        raise InputError(
            f"the run in {folder} is the unquantized model's, which has lost nothing: name a quantized run"
        )
    return metrics


def _finished_blocks(folder: Path) -> FinishedBlocks:
    """The finished blocks as they are on disk; their files are not looked at yet."""
    blocks = FinishedBlocks(folder, {})
    file = blocks.folder / IDENTITY
    try:
        blocks.identity = json.loads(file.read_text(encoding="utf-8"))
        _ = blocks.identity["model"]
    except FileNotFoundError:
        raise InputError(
            f"the run in {folder} has not kept its quantized weights: run it again with keep_checkpoint=always force=true"
        ) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error}): run it again with keep_checkpoint=always force=true") from error
    return blocks


def _refuse_another_model(
    model: Model, checkpoint: Checkpoint, blocks: FinishedBlocks, metrics: dict[str, Any]
) -> None:
    if model.gguf is not None:  # the folder that it is converted to depends on versions of libraries
        expected, found = metrics[MODEL_PATH], fingerprint([model.gguf])
    else:
        expected, found = blocks.identity["model"], checkpoint_fingerprint(checkpoint.folder)
    if expected != found:
        raise InputError(
            f"the model in {model.path} is not the one that the run has quantized (its fingerprint is {found}, was "
            f"{expected}): name that with model=FOLDER, or run it again with keep_checkpoint=always"
        )


def _records(folder: Path) -> Records:
    try:
        with (folder / "layers.csv").open(encoding="utf-8", newline="") as opened:
            return {(int(row["block"]), row["layer"]): row for row in csv.DictReader(opened)}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder / 'layers.csv'} is missing or damaged ({error}): run it again with force=true"
        ) from error

"""The check that a model can be walked block by block, made once for all runs on the same model."""

import dataclasses
import json
import logging
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from runners.config.settings import Settings
from runners.errors import InputError
from runners.models.blocks import BlockSource
from runners.models.walk_check import Rounding, check_walk
from runners.run.keys import model_key
from runners.run.preflight import RunInputs
from runners.storage.files import write
from runners.storage.fingerprint import code_fingerprint

log = logging.getLogger(__name__)

_checked: dict[str, Rounding] = {}  # by the hash of what the answer depends on: a run and its reference are one process


def walk_rounding(settings: Settings, inputs: RunInputs, source: BlockSource) -> Rounding | None:
    """How far the walk is from the model's own forward pass; None: the run has no tokens to walk.

    The answer is kept in memory and in the cache's folder, and does not count among what the cache has found.

    Raises:
        InputError: the model cannot be walked; this is not kept, and found again by the next run.
    """
    tokens = _tokens(inputs)
    if tokens is None:
        return None
    # The key of the model, but for the batch size: the check has its own.
    key = {name: value for name, value in model_key(settings, inputs).items() if name != "batch_size"}
    key |= {"kind": "walk", "check": code_fingerprint("runners/models/walk_check.py")}
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    cache = settings.execution.cache
    file = None if cache is None else Path(cache) / f"walk-{name}.json"
    if (known := _checked.get(name) or _read(file)) is not None:
        return known
    _checked[name] = rounding = check_walk(source, tokens)
    log.info("checked: walked block by block, the model gives its own logits (%s)", rounding)
    if file is not None:
        with suppress(InputError):  # the folder cannot be written: the next run checks again
            write(file, json.dumps({"key": key, "rounding": dataclasses.asdict(rounding)}, indent=2) + "\n")
    return rounding


def _tokens(inputs: RunInputs) -> Tensor | None:
    if inputs.sequences is not None:
        return inputs.sequences.used
    return next((windows.ids for windows in inputs.windows.values()), None)


def _read(file: Path | None) -> Rounding | None:
    if file is None:
        return None
    try:
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rounding"]
        return Rounding(**kept)
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: checked again
        return None

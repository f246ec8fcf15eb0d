"""Checks of a checkpoint's files before transformers reads them, which trusts all of them.

A config.json is not trusted here: it could ask for a billion layers, for files that the run's fingerprint does not cover,
or say that the weights are quantized already. Damage that the files do not show is not found: safetensors has no checksum,
so a checkpoint with a changed weight is another checkpoint, with another fingerprint.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from runners.errors import InputError

# Tensors of any other type (int8, float8) hold codes, which are no weights without their scales.
WEIGHT_TYPES = ("F32", "F16", "BF16")
# What families call the number of decoder blocks.
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TOKENIZER_TIMEOUT = 120  # seconds; reading takes one, or ten where the disk and all cores are busy
READ_TOKENIZER = (
    "import sys; from tokenizers import Tokenizer; Tokenizer.from_file(sys.argv[1]).encode('Read, 1 text.')"
)
# The block from which on attention has a window: Qwen's default is more than small models have blocks.
NOT_COUNTS = ("max_window_layers",)
MAX_COUNT = 10_000  # of anything but layers (heads, experts, labels): more than any model has, and harmless to build
REFUSED_ENTRIES = {
    "transformers_weights": "takes its weights from a file of its own choice: delete that entry",
    "configuration_files": "stands for other files, which are not part of the run's identity: delete that entry",
}


def tensor_names(files: list[Path]) -> list[str]:
    """The names of all tensors in safetensors files.

    Raises:
        InputError: a file is damaged.
    """
    return [name for file in files for name, _ in _tensors(file)]


def check_tensors(files: list[Path], *, may_hold_codes: bool = False) -> int:
    """Refuse safetensors files that are damaged, hold a tensor twice, or hold weights that are not floating-point.

    Args:
        may_hold_codes: the checkpoint is quantized, and its layout is checked elsewhere: weights may be integers.

    Returns:
        How many tensors they hold.

    Raises:
        InputError: naming the file, and the tensor.
    """
    found: dict[str, Path] = {}
    for file in files:
        for name, dtype in _tensors(file):
            if name in found:  # readers disagree on which of the two is used
                raise InputError(
                    f"the weight {name} is in {found[name]} and in {file.name}: only one of them can be true"
                )
            if name.endswith(".weight") and dtype not in WEIGHT_TYPES and not may_hold_codes:
                raise InputError(
                    f"the weight {name} in {file} is of type {dtype}, not one of {', '.join(WEIGHT_TYPES)}"
                )
            found[name] = file
    return len(found)


def check_config(folder: Path, tensors: int) -> None:
    """Refuse a config.json that asks for anything but what the files in its folder hold.

    Args:
        folder: of the checkpoint.
        tensors: how many the safetensors files hold. No model has more layers than tensors.

    Raises:
        InputError: naming the entry.
    """
    file = folder / "config.json"
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds an adapter for another model (adapter_config.json): merge it and save the result"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged: it is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{file} is not a JSON object, so it does not describe a model")
    for key, value in _entries(config):
        if value is not None and key in REFUSED_ENTRIES:
            raise InputError(f"{key} in {file} {REFUSED_ENTRIES[key]}")
        if key.endswith("implementation") and "/" in str(value):
            raise InputError(
                f"{key} in {file} is {value}, code of a hub repository, which is not run: delete that entry"
            )
        if type(value) is int:
            _check_count(file, key, value, tensors)


def refuse_unused(folder: Path, names: Iterable[str]) -> None:
    """Refuse weights that the model has no place for: it would run without them.

    Args:
        folder: of the checkpoint.
        names: tensors that were not loaded. Only weights and biases count: old files also hold masks and rotary
            frequencies.

    Raises:
        InputError: naming the first.
    """
    if unused := sorted(name for name in names if name.endswith((".weight", ".bias", "_proj"))):
        raise InputError(
            f"{folder} holds {unused[0]}, for which its config.json has no place ({len(unused)} are left over): the model "
            "would run without it"
        )


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer.json that cannot be read.

    Another process tries first, as some damaged files abort the process that reads them.

    Raises:
        InputError: saying why.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    # -P: nothing is imported from the current folder, which may hold the checkpoint.
    command = [sys.executable, "-P", "-c", READ_TOKENIZER, str(file)]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TOKENIZER_TIMEOUT,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{file} cannot be loaded: a tokenizer is not read within {TOKENIZER_TIMEOUT} seconds"
        ) from None
    if answer.returncode:
        said = [line for line in answer.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise InputError(
            f"the tokenizer in {folder} cannot be loaded, {file.name} is damaged: {said[-1][:300].rstrip('.')}"
        )


def _check_count(file: Path, key: str, value: int, tensors: int) -> None:
    if key in LAYER_COUNTS and value < 1:
        raise InputError(f"{key} in {file} is {value}: a model has at least one layer")
    if key.endswith(("layer", "layers")) and key not in NOT_COUNTS and value > tensors:
        raise InputError(f"{key} in {file} is {value}, but the weights are only {tensors} tensors")
    if key.startswith("num_") and value > max(MAX_COUNT, tensors):
        raise InputError(f"{key} in {file} is {value}, more than any model has")


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """All entries of a config and of the configs nested in it, without recursion: a file may nest deeper than Python can."""
    waiting = [config]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield from node.items()
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _tensors(file: Path) -> list[tuple[str, str]]:
    """Names and types of a file's tensors. safetensors refuses gaps, overlaps and a wrong length by itself."""
    try:
        with safe_open(file, framework="pt") as opened:
            return [(name, opened.get_slice(name).get_dtype()) for name in opened.keys()]  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise InputError(f"{file} is missing, truncated or damaged ({reason}): copy it again") from error

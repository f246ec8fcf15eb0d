"""A model that is never whole in memory: a skeleton, of which one block at a time is read from its safetensors shards.

What lies outside the blocks (embeddings, the last norm, the head) stays in memory; a block's weights are there while it
is `opened`. Buffers, which hold no weights but tables such as rotary frequencies, are made with the skeleton.
"""

import copy
import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from runners.errors import InputError
from runners.models.blocks import BlockSource, InMemoryModel, decoder_blocks
from runners.models.checkpoint import Checkpoint, Model, load
from runners.models.memory import configure_malloc, trim_malloc
from runners.models.verify import refuse_unused

log = logging.getLogger(__name__)

_looked_at: set[tuple[object, ...]] = set()  # checkpoints whose weights are known to be finite


class _RestoringModel(InMemoryModel):
    """A checkpoint whose names only transformers knows how to read: in memory as a whole, its weights kept beside."""

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        block = self.blocks[index]
        original = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
        try:
            yield block
        finally:
            for name, parameter in block.named_parameters():
                parameter.copy_(original[name])


@dataclass(frozen=True)
class Shards:
    """Where the tensors of a checkpoint lie: name to file."""

    places: dict[str, Path]

    @property
    def files(self) -> list[Path]:
        """Each file once."""
        return list(dict.fromkeys(self.places.values()))

    @classmethod
    def of(cls, folder: Path) -> "Shards":
        """The tensors of `model.safetensors`, or of the files that its index names.

        Raises:
            InputError: the index names a tensor that its file does not hold.
        """
        whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if whole.is_file():
            return cls(dict.fromkeys(_names(whole), whole))
        mapped: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        held = {file: set(_names(folder / file)) for file in set(mapped.values())}
        for name, file in mapped.items():
            if name not in held[file]:
                raise InputError(f"{folder / file} does not hold the weight {name} that {index.name} places there")
        return cls({name: folder / file for name, file in mapped.items()})

    def read(self, names: Iterable[str], device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, each a copy on `device`; floating-point ones in `dtype`. One file is open at a time."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.places[name], []).append(name)
        for file, members in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in members:
                    tensor = opened.get_tensor(name)
                    wanted = dtype if tensor.is_floating_point() else tensor.dtype
                    yield name, tensor.to(device=device, dtype=wanted, copy=True)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the files' headers."""
        found: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        return found

    def state(self) -> tuple[object, ...]:
        """Which files these are, and when they were last written."""
        files = [(file, file.stat()) for file in self.files]
        return tuple((file, status.st_size, status.st_mtime_ns) for file, status in files)

    def check_finite(self) -> None:
        """Look at every weight once, a tensor at a time.

        Raises:
            InputError: naming the first one that contains NaN or infinity.
        """
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dictionary
                    tensor = opened.get_tensor(name)
                    # The extremes are NaN where any number is: one pass, and nothing as large as the tensor beside it.
                    if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
                        raise InputError(f"the weight {name} in {file} contains NaN or infinity: the file is damaged")


class StreamedModel:
    """The skeleton of a checkpoint with everything outside its blocks in memory.

    Args:
        stored: for each weight its name in the files.

    Raises:
        InputError: a weight is missing, or has another shape than config.json says.
    """

    def __init__(
        self, checkpoint: Checkpoint, shards: Shards, stored: dict[str, str], dtype: torch.dtype, device: torch.device
    ) -> None:
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=dtype)
        self.model.eval().requires_grad_(False)
        self.blocks = decoder_blocks(self.model)
        self.device = device
        self.tuple_lengths: dict[type, int] = {}
        self._folder, self._shards, self._dtype = checkpoint.folder, shards, dtype
        self._prefix = next(name for name, module in self.model.named_modules() if module is self.blocks)
        self._stored = stored
        self._check_shapes()
        tied = _tied(self.model, stored)
        outside = [name for name in self._stored if not name.startswith(f"{self._prefix}.")]
        self._fill(self.model, "", [name for name in outside if name not in tied])
        self.model.tie_weights()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with the checkpoint's weights, which leave the memory at the end."""
        block, prefix = self.blocks[index], f"{self._prefix}.{index}."
        self._fill(block, prefix, [name for name in self._stored if name.startswith(prefix)])
        try:
            yield block
        finally:
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            trim_malloc()

    def _check_shapes(self) -> None:
        shapes = self._shards.shapes()
        for name, weight in self.model.state_dict().items():
            stored = shapes.get(self._stored.get(name, ""))
            if stored is not None and stored != tuple(weight.shape):
                raise InputError(
                    f"the weights in {self._folder} do not fit its config.json: {name} is {stored}, and should be "
                    f"{tuple(weight.shape)}"
                )

    def _fill(self, module: nn.Module, prefix: str, names: list[str]) -> None:
        wanted = {self._stored[name]: name for name in names}
        state = {
            wanted[stored].removeprefix(prefix): tensor
            for stored, tensor in self._shards.read(wanted, self.device, self._dtype)
        }
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)


def open_model(checkpoint: Checkpoint, model: Model, device: torch.device) -> BlockSource:
    """The checkpoint, to be read block by block; as a whole where its names are not those of its modules.

    Raises:
        InputError: a weight is missing, has another shape than config.json says, or is not finite.
    """
    configure_malloc()
    shards = Shards.of(checkpoint.folder)
    if (state := shards.state()) not in _looked_at:  # a run and its reference read the same files
        shards.check_finite()
        _looked_at.add(state)
    stored = _stored_names(checkpoint.skeleton, shards)
    refuse_unused(checkpoint.folder, _unused(checkpoint.skeleton, shards, stored))
    if unknown := _unmatched(checkpoint.skeleton, stored):
        log.info("%s is stored under another name: loading %s as a whole", unknown[0], checkpoint.folder)
        return _RestoringModel(load(checkpoint, model, device))
    return StreamedModel(checkpoint, shards, stored, _dtype(checkpoint, model, shards), device)


def _dtype(checkpoint: Checkpoint, model: Model, shards: Shards) -> torch.dtype:
    """What the run asks for, else what config.json says, else what the first weight has: transformers' own order."""
    dtype = getattr(torch, model.dtype) if model.dtype else checkpoint.config.dtype
    if dtype is not None:
        return dtype
    for name, file in shards.places.items():
        with safe_open(file, framework="pt") as opened:
            if (tensor := opened.get_tensor(name)).is_floating_point():
                return tensor.dtype
    return torch.float32


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _stored_names(model: Any, shards: Shards) -> dict[str, str]:
    """For each weight of the model that the files hold as it is: its name there, by the rules of transformers."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found: dict[str, str] = {}
    for stored in shards.places:
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        if converted is None and name in state:
            found[name] = stored
    return found


def _tied(model: Any, stored: dict[str, str]) -> set[str]:
    """Weights that are another's, by config.json: they need not be stored, and are not read."""
    if not model.config.get_text_config().tie_word_embeddings:
        return set()
    tied = model._tied_weights_keys or {}
    return {name for name, original in tied.items() if original in stored} if isinstance(tied, dict) else set(tied)


def _unused(skeleton: Any, shards: Shards, stored: dict[str, str]) -> set[str]:
    """What the files hold and the model has no place for, but for what transformers knows to be of no use."""
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    unused = set(shards.places) - set(stored.values())
    return {name for name in unused if not any(pattern.search(name) for pattern in ignored)}


def _unmatched(skeleton: Any, stored: dict[str, str]) -> list[str]:
    """Weights of the model that the files do not hold under a name that is known here."""
    tied = _tied(skeleton, stored)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    return [name for name in parameters if name not in stored and name not in tied]

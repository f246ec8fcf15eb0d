"""A model that is never whole in memory: a skeleton, of which one decoder block at a time is read from the checkpoint.

The weights outside the decoder blocks (embeddings, the last norm, the head) stay in memory. A block's weights are there only
while it is open. Buffers, such as rotary frequencies, are made with the skeleton; those that are stored are read.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

from runners.errors import InputError
from runners.models.blocks import BlockSource, InMemoryModel, decoder_blocks
from runners.models.checkpoint import Checkpoint, Model, load
from runners.models.experts import take_apart
from runners.models.memory import configure_malloc, trim_malloc
from runners.models.shards import Shards
from runners.models.verify import refuse_unused
from runners.models.weight_names import WeightNames, match_names, unmatched_weights, weight_dtypes

log = logging.getLogger(__name__)

_known_finite: set[tuple[object, ...]] = set()  # states of shards whose weights have been looked at by this process


class _RestoringModel(InMemoryModel):
    """A model in memory as a whole that gives its blocks their original weights back, as if they were read anew."""

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Decoder block `index`; what is written to it is undone at the end."""
        block = self.blocks[index]
        original = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
        try:
            yield block
        finally:
            for name, parameter in block.named_parameters():
                parameter.copy_(original[name])


class StreamedModel:
    """A model whose weights are in memory outside its decoder blocks, and inside the one that is open.

    Args:
        checkpoint: what the model is built from.
        shards: the checkpoint's tensors.
        names: which of them is which weight, from `match_names`.
        dtype: of the weights in memory; some modules keep float32.
        device: where they are.

    Raises:
        InputError: a weight has another shape than config.json says.
    """

    def __init__(
        self, checkpoint: Checkpoint, shards: Shards, names: WeightNames, dtype: torch.dtype, device: torch.device
    ) -> None:
        with init_empty_weights(include_buffers=False):  # most buffers are not stored: they are computed here
            # A copy, as from_config may write its choices into the config that the run reads later.
            self.model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(checkpoint.config), dtype=dtype)
        self.model.eval().requires_grad_(False)
        _compute_buffers(self.model)
        self.blocks = decoder_blocks(self.model)
        self.device = device
        self.tuple_lengths: dict[type, int] = {}
        self._folder, self._shards, self._names = checkpoint.folder, shards, names
        self._dtypes = weight_dtypes(self.model, dtype)
        self._prefix = blocks_prefix(self.model)
        take_apart(self.model)
        self._check_shapes()
        self._fill(self.model, "", lambda name: not name.startswith(self._prefix))
        # By transformers' rule, after everything that is stored is there: a head that is stored, with other values than the
        # embedding that config.json ties it to, stays what it is.
        self.model.tie_weights(missing_keys=set(names.missing), recompute_mapping=False)
        self.model.requires_grad_(False)
        for module in self.model.modules():  # one by one: model.to(device) cannot move weights that are not there
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)

    @contextmanager
    def open_block(self, index: int) -> Iterator[nn.Module]:
        """Decoder block `index` with the checkpoint's weights, which leave the memory at the end."""
        # Read anew each time it is opened, so what was written to it is lost.
        block, prefix = self.blocks[index], f"{self._prefix}{index}."
        self._fill(block, prefix, lambda name: name.startswith(prefix))
        try:
            yield block
        finally:
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            trim_malloc()

    def _check_shapes(self) -> None:
        shapes, made = self._shards.shapes(), self._names.made
        for name, weight in self.model.state_dict().items():
            stored = made.get(name) or shapes.get(self._names.stored.get(name, ""))
            if stored is not None and stored != tuple(weight.shape):
                raise InputError(
                    f"the weights in {self._folder} do not fit its config.json: {name} is {stored}, and should be "
                    f"{tuple(weight.shape)}"
                )

    def _fill(self, module: nn.Module, prefix: str, is_wanted: Callable[[str], bool]) -> None:
        """Give a module, whose name is `prefix`, its weights, as far as their names are wanted."""
        wanted = {stored: name for name, stored in self._names.stored.items() if is_wanted(name)}
        dtypes = {stored: self._dtypes[name] for stored, name in wanted.items()}
        state = {wanted[stored]: tensor for stored, tensor in self._shards.read(dtypes, self.device)}
        for conversion in self._names.conversions:  # one at a time: what each is made of is in memory beside it
            if is_wanted(conversion.name):
                dtypes = dict.fromkeys((tensor for tensor, _ in conversion.sources), self._dtypes[conversion.name])
                state |= conversion.convert(self.model, dict(self._shards.read(dtypes, self.device)))
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        # assign: the skeleton's weights have no memory to copy into. Not strict: these are only a part of the weights.
        module.load_state_dict(state, strict=False, assign=True)
        module.requires_grad_(False)


def _compute_buffers(model: Any) -> None:
    """Compute the buffers that are not stored, such as rotary frequencies, anew, as `from_pretrained` does at its end.

    It computes them outside the context in which the model was built, where the default dtype was the model's: a table of
    sines from bfloat16 angles is another one.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that only buffers are computed
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)  # else the whole module is passed over
    model.initialize_weights()


def open_model(checkpoint: Checkpoint, model: Model, device: torch.device) -> BlockSource:
    """The model, to be read block by block; as a whole where only transformers can make weights of the files' tensors.

    Args:
        checkpoint: from `open_checkpoint`.
        model: the dtype that the run asks for.
        device: where the weights are put.

    Raises:
        InputError: a weight is missing, has another shape than config.json says, or is not finite.
    """
    configure_malloc()
    shards = checkpoint.shards
    # Once a process: a run and its reference read the same files.
    if (state := shards.state()) not in _known_finite:
        shards.check_finite()
        _known_finite.add(state)
    names = match_names(checkpoint.skeleton, shards)
    refuse_unused(checkpoint.folder, names.unused)
    if unknown := unmatched_weights(checkpoint.skeleton, names, blocks_prefix(checkpoint.skeleton)[:-1]):
        log.info("%s is not stored as it is: loading %s as a whole", unknown[0], checkpoint.folder)
        return _RestoringModel(load(checkpoint, model, device))
    return StreamedModel(checkpoint, shards, names, _dtype(checkpoint, model, shards), device)


def blocks_prefix(model: Any) -> str:
    """What the names of the weights in the decoder blocks begin with, such as `model.layers.`."""
    blocks = decoder_blocks(model)
    return next(f"{name}." for name, module in model.named_modules() if module is blocks)


def _dtype(checkpoint: Checkpoint, model: Model, shards: Shards) -> torch.dtype:
    """What the run asks for, else what config.json says, else what the first weight has: transformers' own order."""
    if model.dtype:
        return getattr(torch, model.dtype)
    return checkpoint.config.dtype or shards.first_dtype()

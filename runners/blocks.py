"""Walk a decoder block by block, so that only one block's activations are held at a time.

No family of models is known by name: the blocks are found by their class, what a block receives besides the hidden state
(masks, position embeddings, alibi) is recorded from the model's own forward pass, and layers that share an input are seen
to share it when the block runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantease.precision import second_moment
from runners.errors import InputError

ACTIVATIONS_SHARE = 0.4  # of the GPU's free memory; the blocks' own needs the rest
PROBE = 16  # tokens of the two short sequences that show whether a block's arguments depend on the text


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer of a block, seen as (out, in), however its module stores the weight."""

    module: nn.Linear | Conv1D

    @property
    def weight(self) -> Tensor:
        """The weight (out, in), in the model's dtype: a view of the module's."""
        weight = self.module.weight.detach()
        return weight.T if isinstance(self.module, Conv1D) else weight  # GPT-2 stores (in, out)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    def replace(self, weight: Tensor) -> None:
        """Write `weight` (out, in) into the module, in its dtype."""
        self.weight.copy_(weight)


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The list of a decoder's blocks.

    Raises:
        InputError: there is no such list, or its blocks hold matrices that are not in linear layers.
    """
    count = model.config.get_text_config().num_hidden_layers
    names = set(model._no_split_modules or ())
    for module in model.modules():
        is_list = isinstance(module, nn.ModuleList) and len(module) == count
        if is_list and all(type(block).__name__ in names for block in module):
            _refuse_hidden_matrices(model, module[0])
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder blocks: it is not a supported decoder")


def linear_layers(block: nn.Module) -> dict[str, LinearLayer]:
    """The linear layers of a block by name."""
    modules = block.named_modules()
    return {name: LinearLayer(module) for name, module in modules if isinstance(module, nn.Linear | Conv1D)}


def _refuse_hidden_matrices(model: nn.Module, block: nn.Module) -> None:
    """Weights outside linear layers (fused experts, say) would stay unquantized without anybody noticing."""
    inside = {f"{name}.weight" for name in linear_layers(block)}
    for name, parameter in block.named_parameters():
        if parameter.ndim >= 2 and name not in inside:
            raise InputError(
                f"{type(model).__name__} keeps weights outside linear layers ({name}, {tuple(parameter.shape)}), which "
                "would stay unquantized: this architecture is not supported"
            )


@dataclass
class Call:
    """What a block receives besides the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stop(Exception):
    """Ends a forward pass at the first block."""


class Walk:
    """The activations that enter the current block, for all sequences, and the means to send them through it.

    Args:
        model: a causal language model.
        sequences: token ids (sequences, length).
        batch_size: sequences that go through a block at once.
        offload: keep the activations in host memory; None: only if they would crowd the GPU.
    """

    def __init__(self, model: Any, sequences: Tensor, batch_size: int, offload: bool | None = None) -> None:
        self.model = model
        self.blocks = decoder_blocks(model)
        self._device = next(model.parameters()).device
        _refuse_arguments_that_depend_on_the_text(self, sequences)
        self._calls: dict[int, list[Call]] = {}  # by batch size: masks and alibi have a batch dimension
        self.hidden: list[Tensor] = []  # (batch, length, width) each
        for batch in sequences.split(batch_size):
            if len(batch) not in self._calls:
                self._calls[len(batch)] = self._record(batch)
            hidden = self._embed(batch)
            if not self.hidden:
                self._offloads = _crowds(hidden, sequences.numel()) if offload is None else offload
            self.hidden.append(_to_host(hidden) if self._offloads else hidden)

    def run(self, index: int) -> Iterator[Tensor]:
        """Send every batch through block `index`; yields what leaves it."""
        for batch in _ahead(self.hidden, self._device) if self._offloads else self.hidden:
            yield self.forward(index, batch)

    def forward(self, index: int, batch: Tensor) -> Tensor:
        """Send one batch through block `index`."""
        call = self._calls[len(batch)][index]
        output = self.blocks[index](batch, *call.args, **call.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def advance(self, index: int) -> None:
        """Replace the inputs of block `index` by its outputs, batch by batch.

        Raises:
            InputError: they are not finite, so nothing that follows would mean anything.
        """
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for place, output in enumerate(self.run(index)):
            finite &= torch.isfinite(output).all()  # asked for at the end, so that no batch waits for it
            if self._offloads:
                self.hidden[place].copy_(output, non_blocking=True)
            else:
                self.hidden[place] = output
        if not finite:
            raise InputError(
                f"the activations that leave block {index} are not finite: try model.dtype=bfloat16 or float32"
            )

    def _record(self, batch: Tensor) -> list[Call]:
        calls: list[Call] = []

        def keep(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls.append(Call(args[1:], rest))

        with _hooks(self.blocks, keep):
            self._model(batch)
        return calls

    def _embed(self, batch: Tensor) -> Tensor:
        embedded: list[Tensor] = []

        def stop(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embedded.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        with _hooks([self.blocks[0]], stop), suppress(_Stop):
            self._model(batch)
        return embedded[0]

    def _model(self, batch: Tensor) -> None:
        self.model(batch.to(self._device), use_cache=False)


def _crowds(hidden: Tensor, tokens: int) -> bool:
    """Whether the activations of so many tokens would take more than their share of the GPU's free memory."""
    if not hidden.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(hidden.device)
    return tokens * hidden.shape[-1] * hidden.element_size() > ACTIVATIONS_SHARE * free


def _to_host(hidden: Tensor) -> Tensor:
    host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=hidden.is_cuda)
    return host.copy_(hidden)


def _ahead(batches: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of host memory on `device`, each copied while the one before it is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(batch: Tensor) -> Tensor:
        copies.wait_stream(work)  # which may still be writing to it from the pass before
        with torch.cuda.stream(copies):
            return batch.to(device, non_blocking=True)

    coming = fetch(batches[0])
    for place in range(len(batches)):
        work.wait_stream(copies)
        batch = coming
        if place + 1 < len(batches):
            coming = fetch(batches[place + 1])
        batch.record_stream(work)
        yield batch


def shared_inputs(walk: Walk, index: int) -> list[tuple[str, ...]]:
    """The linear layers of a block, grouped by the input they share, in the order in which the block uses them.

    A layer that the first batch does not use is in no group.
    """
    layers = linear_layers(walk.blocks[index])
    seen: dict[tuple[Any, ...], tuple[Tensor, list[str]]] = {}  # holds the tensors, so that none takes another's memory

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            seen.setdefault((x.data_ptr(), x.shape, x.stride()), (x, []))[1].append(name)

        return hook

    handles = [layer.module.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        next(walk.run(index))
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(names) for _, names in seen.values()]


@dataclass(frozen=True)
class InputStatistics:
    """What calibration says of the input x of a layer: means over all tokens, float32."""

    hessian: Tensor  # (in, in), of x x^T
    mean_input: Tensor  # (in,), of |x|

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self.hessian).all())


def input_statistics(walk: Walk, index: int, groups: list[tuple[str, ...]]) -> list[InputStatistics]:
    """Run block `index` on all batches; for each group of layers the statistics of the input they share."""
    layers = linear_layers(walk.blocks[index])
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    tokens = 0

    def add(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            moment, size = second_moment(x), x.abs().sum(0, dtype=torch.float32)
            if name in sums:
                sums[name][0].add_(moment)
                sums[name][1].add_(size)
            else:
                sums[name] = moment, size

        return hook

    handles = [layers[group[0]].module.register_forward_pre_hook(add(group[0])) for group in groups]
    try:
        for output in walk.run(index):
            tokens += output.shape[0] * output.shape[1]
    finally:
        for handle in handles:
            handle.remove()
    return [InputStatistics(*(total.div_(tokens) for total in sums[group[0]])) for group in groups]


@contextmanager
def _hooks(blocks: Any, hook: Callable[..., None]) -> Iterator[None]:
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_arguments_that_depend_on_the_text(walk: Walk, sequences: Tensor) -> None:
    """What was recorded from one batch is passed on for all; refuse a model in which that would be wrong."""
    length = min(PROBE, sequences.numel() // 2)
    sample = sequences.flatten()[: 2 * length].reshape(2, length)
    first, second = (walk._record(row[None]) for row in sample)
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if not _same(list(a.args), list(b.args)) or not _same(a.kwargs, b.kwargs):
            raise InputError(
                f"block {index} of {type(walk.model).__name__} receives arguments that depend on the text: "
                "this architecture is not supported"
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return True  # flags, caches that are None, modules

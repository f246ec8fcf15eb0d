"""Whether the walk, one decoder block after the other, is the model's own forward pass. Where it is not, the reason.

The walk (`runners.models.activations`) takes for granted that every decoder block runs once, in the order of the list; that
the tensor which leaves a block is the one that enters the next; and that a block receives nothing else of what the blocks
before it have made. An architecture without these properties would be measured wrongly and without a word. So a model runs
its own forward pass once, on a few short sequences, while the walk takes the same sequences along, through each block while
it is open: one more reading of the weights.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource
from runners.models.bypass import (
    PROBE_TOKENS,
    BlockArguments,
    bypassed,
    learn_tuple_lengths,
    run_model,
    same,
    split_arguments,
)
from runners.models.containers import contents, is_container, unchanged, written_to
from runners.models.experts import own_experts
from runners.models.memory import Memory, out_of_memory

SEQUENCES = 3  # together in the model's own pass
PART = 2  # of them go through a block together in a second walk, and then the third alone
SAME_KERNELS = (
    16  # units in the last place that a result may differ by between rows of one batch, for sums in another order
)


@dataclass(frozen=True)
class Rounding:
    """How far the walk's logits are from the model's own, as a share of the largest logit; 0: bit for bit the same.

    Attributes:
        same_batch: in batches of the same size.
        other_batch: in batches of another size, whose products may be summed in another order.
        allowed: what `other_batch` may be: half of the digits of the model's dtype.
    """

    same_batch: float
    other_batch: float
    allowed: float

    def __str__(self) -> str:
        if self.same_batch == self.other_batch == 0:
            return "bit for bit"
        same_batch = f"within {self.same_batch:.0e}" if self.same_batch else "bit for bit"
        return f"{same_batch} in the same batches, within {self.other_batch:.0e} of the largest logit in others"


@torch.no_grad()
def check_walk(source: BlockSource, tokens: Tensor) -> Rounding:
    """Walk a few short sequences and hold every step against the model's own forward pass.

    Args:
        source: the model. Every block is opened once, and once more the first of each class.
        tokens: token ids (sequences, length) of the run, of which the first few are used.

    Raises:
        InputError: the walk is not the model's forward pass, or a token changes predictions of tokens before it.
    """
    ids = _sequences(tokens)
    try:
        _check_order(source, ids)
        walks = [BlockActivations(source, ids, SEQUENCES, memory=Memory(batch_size=size)) for size in (None, PART)]
        own_pass = _OwnPass(source, ids, walks)
        with own_pass.watched(), own_experts(source.model):
            own = run_model(source, ids).logits
        own_pass.check_count()
        together, divided = (walk.hidden[0] for walk in walks)
        walked = walks[0].logits(together), torch.cat([walks[1].logits(part) for part in divided.split(PART)])
    except Exception as error:
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _refusal(source, f"its decoder blocks cannot be run one after the other ({reason})") from error
    _check_causal(source, own)
    return _rounding(source, own, *walked)


def _sequences(tokens: Tensor) -> Tensor:
    """Three sequences; the last two differ in their last token alone."""
    length = min(PROBE_TOKENS, tokens.shape[1])
    first, second = tokens.flatten().repeat(2)[: 2 * length].reshape(2, length)
    third = second.clone()
    others = tokens[tokens != second[-1]]
    third[-1] = others[0] if others.numel() else abs(second[-1] - 1)
    # The third is alone in the divided walk, with another text than the one whose shape stands in for it in `logits`.
    return torch.stack([first, second, third])


def _check_order(source: BlockSource, ids: Tensor) -> None:
    """Refuse a model that does not run its blocks once each, in the order of the list; before any block is read."""
    visited: list[int] = []

    def visit(index: int, hidden: Tensor, _arguments: BlockArguments) -> Tensor:
        visited.append(index)
        return hidden

    learn_tuple_lengths(source, ids)
    with bypassed(source, visit):
        run_model(source, ids[:1])
    if again := sorted({index for index in visited if visited.count(index) > 1}):
        blocks = f"block {again[0]}" if len(again) == 1 else f"blocks {again[0]} to {again[-1]}"
        raise _refusal(
            source,
            f"its forward pass runs {blocks} more than once, and the walk would run each once. Its layers would have to be "
            "calibrated on the inputs of all rounds together",
        )
    if visited != list(range(len(source.blocks))):
        raise _refusal(source, f"its forward pass runs blocks {visited}, where there are {len(source.blocks)}")


class _OwnPass:
    """Watches the model's own forward pass: opens each block for it, and sends the walks through the block as well."""

    def __init__(self, source: BlockSource, ids: Tensor, walks: list[BlockActivations]) -> None:
        self._source, self._ids, self._walks = source, ids, walks
        self._opened = ExitStack()
        self._next = 0  # the block that is to run
        self._left: Tensor | None = None  # what has left the block before; kept, so that no other takes its memory
        self._identity: Any = None  # of that tensor, at that moment
        self._before: Any = None  # the contents of the current block's arguments, before it runs
        self._is_walking = False  # the walks run the same modules, whose hooks are not for them

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The model with hooks at its blocks, for the time of the context."""
        with ExitStack() as handles, self._opened:
            for index, block in enumerate(self._source.blocks):
                enter = block.register_forward_pre_hook(self._unless_walking(self._enter, index), with_kwargs=True)
                handles.callback(enter.remove)
                leave = block.register_forward_hook(self._unless_walking(self._leave, index), with_kwargs=True)
                handles.callback(leave.remove)
            yield

    def check_count(self) -> None:
        """Refuse a model whose pass has ended before the last block.

        Raises:
            InputError: naming the first block that has not run.
        """
        if self._next < len(self._source.blocks):
            raise _refusal(self._source, f"its forward pass does not run block {self._next}")

    def _unless_walking(self, visit: Callable[..., None], index: int) -> Callable[..., None]:
        def hook(_block: nn.Module, *arguments: Any) -> None:
            if self._is_walking:
                return
            self._is_walking = True
            try:
                with own_experts(self._source.model, own=False):
                    visit(index, *arguments)
            finally:
                self._is_walking = False

        return hook

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if index != self._next:
            raise _refusal(self._source, f"its forward pass runs block {index} where block {self._next} is next")
        hidden, arguments = split_arguments(args, kwargs)
        self._check_hidden(index, hidden)
        self._check_arguments(index, arguments)
        self._before = contents((hidden, arguments.named()))
        self._opened.enter_context(self._source.open_block(index))
        # The walks first: what a block leaves in a module for later ones is then what the model's own pass has left there,
        # of as many sequences as only one of the walks has.
        for walk in self._walks:
            walk.advance(index)

    def _leave(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._check_unchanged(index, *split_arguments(args, kwargs))
        left: Tensor = output[0] if isinstance(output, tuple | list) else output
        self._left, self._identity = left, _identity(left)
        self._opened.close()
        self._next += 1

    def _check_hidden(self, index: int, hidden: Tensor) -> None:
        if hidden.ndim != 3 or len(hidden) != SEQUENCES:
            shape = tuple(hidden.shape)
            raise _refusal(
                self._source,
                f"block {index} receives {shape} for {SEQUENCES} sequences, not (sequences, length, width)",
            )
        if self._left is not None and _identity(hidden) != self._identity:
            between = f"what enters block {index} is not the very tensor that left block {index - 1}"
            raise _refusal(self._source, f"{between}: the model does some work between the two")
        if not _equal(hidden, self._walks[0].hidden[0]):
            raise _refusal(self._source, f"what enters block {index} is not what the walk has there")

    def _check_unchanged(self, index: int, hidden: Tensor, arguments: BlockArguments) -> None:
        before, now = self._before, contents((hidden, arguments.named()))
        if not unchanged(before[0], now[0]):
            raise _refusal(self._source, f"block {index} writes to the tensor that it receives")
        for name, value in arguments.named().items():
            # Containers are copied for each batch, and what is put into them travels with it; the tensors are not copied.
            old = before[1][name]
            if written_to(old) or not (is_container(value) or unchanged(old, now[1][name])):
                raise _refusal(
                    self._source, f"block {index} writes to its argument {name}, which other blocks may read"
                )

    def _check_arguments(self, index: int, arguments: BlockArguments) -> None:
        expected, now = self._walks[0].arguments(index, self._ids).named(), arguments.named()
        for name in expected.keys() | now.keys():
            mine, theirs = expected.get(name), now.get(name)
            # A container holds what the blocks before have put into it. The walk adds that; logits show whether rightly.
            if not is_container(theirs) and not same(mine, theirs):
                raise _refusal(
                    self._source,
                    f"block {index} receives another {name} where the blocks before it run than without them",
                )


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """The same for two tensors if and only if they are the same memory, unchanged: views of all of it included."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def _check_causal(source: BlockSource, own: Tensor) -> None:
    """Refuse a model in which the last token, where the last two sequences differ, changes logits of tokens before it."""
    second, third = own[1, :-1].float(), own[2, :-1].float()
    epsilon = torch.finfo(own.dtype).eps
    if _distance(second, third) > min(SAME_KERNELS * epsilon, epsilon**0.5):
        raise InputError(
            f"in {type(source.model).__name__} a token changes the predictions of tokens before it, so it is no model of "
            "the next token and has no perplexity: take a causal model, or set is_decoder=true in config.json if it is one"
        )


def _rounding(source: BlockSource, own: Tensor, same_batch: Tensor, other_batch: Tensor) -> Rounding:
    allowed = torch.finfo(own.dtype).eps ** 0.5
    rounding = Rounding(_distance(own, same_batch), _distance(own, other_batch), allowed)
    if not _equal(own, same_batch):
        raise _refusal(
            source, f"the walk's logits differ by {rounding.same_batch:.0e} of the largest from the model's own"
        )
    if not rounding.other_batch <= allowed:
        raise _refusal(source, f"its logits depend on the batch size, by {rounding.other_batch:.0e} of the largest")
    return rounding


def _equal(own: Tensor, walked: Tensor) -> bool:
    """Whether the same work on the same batch gave the same: bit for bit, but on a GPU, where sums may change order."""
    if walked.device.type == "cpu":
        return torch.equal(own, walked)
    return _distance(own, walked) <= torch.finfo(own.dtype).eps ** 0.5


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest entry of the first."""
    if not a.numel():
        return 0.0
    return ((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-30)).item()


def _refusal(source: BlockSource, reason: str) -> InputError:
    return InputError(
        f"{type(source.model).__name__} cannot be taken through its decoder blocks one by one: {reason}. This architecture "
        "is not supported"
    )

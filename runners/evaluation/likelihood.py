"""Measure a model on windows of text block by block, so that a model that cannot be held can still be evaluated.

Beside the loss of every window: how far the next-token distribution is from the unquantized model's (KL divergence), and how
often both think the same token the most likely. For that the unquantized activations walk through each block before its
weights are replaced. What leaves the last block is kept for other runs, so that they walk once for a whole study.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource, replace_weights
from runners.models.memory import Memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.storage.cache import Cache

LOGITS_BYTES = 1e9  # that the logits of the sequences taken together may take, in float32
POSITIONS = 128  # whose distributions over the vocabulary are compared at once


@dataclass
class SharedActivations:
    """What leaves the last block of the unquantized model, for each text, kept for all runs on the model.

    Attributes:
        key: all that it depends on but the text.
    """

    cache: Cache
    key: dict[str, Any]

    def get(self, sha256: str) -> Tensor | None:
        """Activations (windows, length, width) in host memory, of the text whose tokens have this hash."""
        tensors = self.cache.get(self._of(sha256), "cpu")
        return None if tensors is None else tensors["hidden"]

    def put(self, sha256: str, hidden: Tensor) -> None:
        """Keep them."""
        self.cache.put(self._of(sha256), {"hidden": hidden})

    def _of(self, sha256: str) -> dict[str, Any]:
        return self.key | {"kind": "final activations", "ids": sha256}


@dataclass
class _Text:
    """A text under way: its windows, and the activations of the quantized and of the unquantized model."""

    ids: Tensor
    sha256: str
    walk: BlockActivations
    reference: BlockActivations | None = None
    final: Tensor | None = None  # what leaves the last block of the unquantized model, where it is known already
    has_arrived: bool = False  # at the end of the walk: another run has walked it


class Evaluation:
    """Measures all texts in one pass over the blocks.

    Args:
        texts: name to token ids (windows, length) and their hash.
        batch_size: windows that are held together.
        blocks: of the quantized model; None: the model as it is.
        shared: where the unquantized model's activations are kept; None: measure no agreement with it.
    """

    def __init__(
        self,
        source: BlockSource,
        texts: dict[str, tuple[Tensor, str]],
        batch_size: int,
        *,
        blocks: FinishedBlocks | None = None,
        shared: SharedActivations | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.source, self.blocks, self.shared = source, blocks, shared
        self.memory = memory or Memory()
        self._batch_size = batch_size
        self._texts = {name: self._begin(*text) for name, text in texts.items()}

    def _begin(self, ids: Tensor, sha256: str) -> _Text:
        text = _Text(ids, sha256, BlockActivations(self.source, ids, self._batch_size, memory=self.memory))
        if self.shared:
            text.final = self.shared.get(sha256)
        if self.blocks is None and text.final is not None:
            text.walk.hidden = list(text.final.split(self._batch_size))
            text.has_arrived = True
        elif self.shared and text.final is None and self.blocks is not None:
            text.reference = BlockActivations(self.source, ids, self._batch_size, memory=self.memory)
        return text

    @torch.no_grad()
    def run(self, step: Callable[[str], None]) -> dict[str, dict[str, list[float]]]:
        """What every window of every text measures: its mean `nll` (nats a token) and, beside a reference, `kl` and `top1`.

        Args:
            step: called with what was done, once a block and once a text.
        """
        under_way = [text for text in self._texts.values() if not text.has_arrived]
        for index in range(len(self.source.blocks)):
            if under_way:
                self._walk(under_way, index)
            step(f"block {index + 1}/{len(self.source.blocks)}")
        answer = {}
        for name, text in self._texts.items():
            answer[name] = self._measure(text)
            step(f"perplexity  {name}")
        return answer

    def _walk(self, texts: list[_Text], index: int) -> None:
        with self.source.open_block(index) as block:
            for text in texts:
                if text.reference:
                    self._advance(text.reference, index)
            if self.blocks is not None:
                replace_weights(block, self.blocks.layers(index, str(self.source.device)))
            for text in texts:
                self._advance(text.walk, index)

    def _advance(self, walk: BlockActivations, index: int) -> None:
        smaller = self.memory.smaller_batches(walk.batch_size)
        what = f"while block {index} was evaluated"
        self.memory.retry(what, lambda: walk.advance(index), smaller, walk.to_host)

    def _measure(self, text: _Text) -> dict[str, list[float]]:
        final = text.final
        if self.shared and final is None:
            unquantized = text.walk if self.blocks is None else text.reference
            final = torch.cat([hidden.cpu() for hidden in unquantized.hidden]) if unquantized else None
            if final is not None:
                self.shared.put(text.sha256, final)
        if self.blocks is None:
            final = None  # it would be compared with itself
        measured: dict[str, list[float]] = {}
        first = 0
        for batch in text.walk.hidden:
            for hidden in batch.split(self._rows(text.ids)):
                here = slice(first, first := first + len(hidden))
                logits = text.walk.logits(hidden)
                reference = None if final is None else text.walk.logits(final[here])
                for name, values in compare(logits, text.ids[here].to(logits.device), reference).items():
                    measured.setdefault(name, []).extend(values.tolist())
        return measured

    def _rows(self, ids: Tensor) -> int:
        """Windows whose logits are made at once."""
        vocabulary = self.source.model.config.get_text_config().vocab_size
        return max(1, int(LOGITS_BYTES / (4 * vocabulary * ids.shape[1])))


def compare(logits: Tensor, ids: Tensor, reference: Tensor | None = None) -> dict[str, Tensor]:
    """Means over the predicted tokens of each window, float64 (windows,).

    Args:
        logits: (windows, length, vocabulary); the last position predicts nothing that is known.
        ids: (windows, length).
        reference: logits of the unquantized model.

    Returns:
        `nll` in nats; with a reference also `kl`, the divergence of the distribution from the reference's in nats, and
        `top1`, the share of the positions where the most likely token is the same.
    """
    count = ids.shape[1] - 1
    sums = {name: torch.zeros(len(ids), dtype=torch.float64, device=logits.device) for name in ("nll", "kl", "top1")}
    for first in range(0, count, POSITIONS):
        here = slice(first, min(first + POSITIONS, count))
        guess = logits[:, here].float()
        target = ids[:, here.start + 1 : here.stop + 1]
        nll = cross_entropy(guess.flatten(0, 1), target.flatten(), reduction="none")
        sums["nll"] += nll.double().reshape(target.shape).sum(1)
        if reference is not None:
            theirs = log_softmax(reference[:, here].float(), -1)
            sums["kl"] += (theirs.exp() * (theirs - log_softmax(guess, -1))).sum(-1).double().sum(1)
            sums["top1"] += (guess.argmax(-1) == theirs.argmax(-1)).double().sum(1)
    measured = ("nll",) if reference is None else ("nll", "kl", "top1")
    return {name: (sums[name] / count).cpu() for name in measured}

"""Measure a model on windows of text one decoder block at a time, so that a model larger than memory can be evaluated.

All windows of all texts pass a block before the next one is opened. To compare a quantized model with the unquantized one,
the activations of the unquantized model take the same way: they pass each block before its weights are replaced, so every
block is read once for both. What leaves the last block of the unquantized model is kept in the cache, so that only one run
of a study has to compute it. Where the unquantized model itself is measured, a second set of activations that is rounded
once more after every block passes beside the first: the noise floor of the agreement (see `noise_floor`).
"""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from runners.console import Bar
from runners.evaluation.likelihood import measure_windows
from runners.evaluation.noise_floor import rounded_once_more
from runners.evaluation.token_agreement import TokenAgreement
from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource, replace_weights
from runners.models.memory import Memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.metrics import KL_FLOOR, TOP1_FLOOR
from runners.storage.cache import Cache

# Bytes of float32 logits that are computed at once. A window of 2,048 tokens takes 0.4 GB with OPT's vocabulary and 2.1 GB
# with Gemma's, so a whole batch of windows must not become logits together; at least one window always does. On a CPU they
# are few enough that malloc keeps their memory (`runners.models.memory`) instead of asking for zeroed pages every time.
LOGITS_BYTES = {"cpu": 2e7, "cuda": 1e9}


class Mode(Enum):
    """What is computed for one text: which models' activations pass through the blocks."""

    UNQUANTIZED = auto()  # the unquantized model is measured; it is not compared with itself
    UNQUANTIZED_CACHED = auto()  # the same, but another run has computed its final activations: nothing has to pass
    QUANTIZED = auto()  # a quantized model is measured, and agreement is not asked for
    REFERENCE_CACHED = auto()  # a quantized model is compared with final activations from the cache
    PROBE = auto()  # the model that is measured, whichever it is, with its loss alone
    REFERENCE_COMPUTED = auto()  # a quantized model is compared with the unquantized one, which passes the same blocks,
    # or, where the model was quantized elsewhere, the blocks of its own checkpoint


@dataclass
class ReferenceCache:
    """The unquantized model's activations after its last block, for each text, shared by all runs on the model.

    Attributes:
        key: everything that they depend on except the text.
    """

    cache: Cache
    key: dict[str, Any]

    def get(self, sha256: str) -> Tensor | None:
        """Activations (windows, length, width) in host memory of the text whose token ids have this hash, if cached."""
        tensors = self.cache.get(self._key_of(sha256), "cpu")
        return None if tensors is None else tensors["hidden"]

    def put(self, sha256: str, hidden: Tensor) -> None:
        """Keep activations (windows, length, width) for other runs."""
        self.cache.put(self._key_of(sha256), {"hidden": hidden})

    def _key_of(self, sha256: str) -> dict[str, Any]:
        return self.key | {"kind": "final activations", "ids": sha256}


@dataclass
class _TextInProgress:
    """One text and the activations that are computed for it.

    Attributes:
        ids: token ids (windows, length).
        sha256: their hash.
        activations: those of the model that is measured.
        reference: those of the unquantized model; only in mode REFERENCE_COMPUTED.
        head: of the model that was the original of one quantized elsewhere; its last norm and head may be others.
        cached: final activations of the unquantized model (windows, length, width); only in the two modes CACHED.
        rounded: those of the unquantized model that is rounded once more; only where it is measured with its noise floor.
        agreement: of every token with the unquantized model, or with its noise floor.
    """

    ids: Tensor
    sha256: str
    mode: Mode
    activations: BlockActivations
    reference: BlockActivations | None = None
    head: BlockActivations | None = None
    cached: Tensor | None = None
    rounded: BlockActivations | None = None
    agreement: TokenAgreement = field(default_factory=TokenAgreement)

    @property
    def walks(self) -> list[BlockActivations]:
        """All activations that have to pass the blocks."""
        mine = None if self.mode is Mode.UNQUANTIZED_CACHED else self.activations
        return [activations for activations in (self.reference, mine, self.rounded) if activations is not None]

    def reference_logits(self, hidden: Tensor) -> Tensor:
        """The unquantized model's logits of its activations (windows, length, width) after the last block."""
        return (self.head or self.activations).logits(hidden)


class BlockwiseEvaluation:
    """Measures all texts in one pass over the decoder blocks.

    Args:
        texts: name to token ids (windows, length) and their hash.
        batch_size: windows that go through a block together.
        blocks: the quantized blocks; None: measure the unquantized model.
        references: cache of the unquantized model's final activations; None: do not measure agreement with it, nor its
            noise floor.
        memory: what to make smaller when memory runs out.
        original: the unquantized model where `source` was quantized elsewhere and is compared with it.
        probes: name to token ids (windows, length) of which only the loss is asked, and that are not kept in the cache.
    """

    def __init__(
        self,
        source: BlockSource,
        texts: dict[str, tuple[Tensor, str]],
        batch_size: int,
        *,
        blocks: FinishedBlocks | None = None,
        references: ReferenceCache | None = None,
        memory: Memory | None = None,
        original: BlockSource | None = None,
        probes: dict[str, Tensor] | None = None,
    ) -> None:
        self._source, self._blocks, self._references = source, blocks, references
        self._original = original
        self._memory = memory or Memory()
        self._batch_size = batch_size
        self._texts = {name: self._begin(*text) for name, text in texts.items()}
        for name, ids in (probes or {}).items():
            self._texts[name] = _TextInProgress(ids, "", Mode.PROBE, self._enter(ids))

    @torch.no_grad()
    def run(self, bar: Bar | None = None) -> dict[str, dict[str, list[float]]]:
        """Measure every text; returns, for each, what `measure_windows` names, one value per window.

        For the unquantized model KL_FLOOR and TOP1_FLOOR take the place of `kl` and `top1`.

        Args:
            bar: shows the progress: of `steps` steps, and of blocks and then texts as its parts.

        Raises:
            InputError: activations are not finite, or memory runs out with nothing left to make smaller.
        """
        self._bar = bar or Bar()
        count = len(self._source.blocks)
        in_progress = {name: text for name, text in self._texts.items() if text.walks}
        self._bar.begin("the texts are measured")
        self._pass_original(in_progress)
        for index in range(count if in_progress else 0):
            self._pass_block(in_progress, index)
            self._bar.finish(f"block {index + 1} of {count}", index + 1, count)
        self._bar.begin()
        measured, done, windows = {}, 0, sum(len(text.ids) for text in self._texts.values())
        for name, text in self._texts.items():
            measured[name] = self._measure(name, text)
            what = f"probe {name}" if text.mode is Mode.PROBE else name
            done += len(text.ids)
            self._bar.finish(f"{what} measured", done, windows, len(text.ids))  # a probe is one window
        return measured

    @property
    def steps(self) -> int:
        """Steps of the progress: one for every window in every walk through every block, and one to measure it."""
        blocks = len(self._source.blocks)
        return sum(len(text.ids) * (blocks * len(text.walks) + 1) for text in self._texts.values())

    def token_summary(self, name: str) -> dict[str, float]:
        """After `run`: quantiles of the KL of a text's tokens, and its mean by confidence; {} where it has no agreement."""
        text = self._texts[name]
        return text.agreement.summary() if text.agreement.kl and not text.rounded else {}

    def _begin(self, ids: Tensor, sha256: str) -> _TextInProgress:
        activations = self._enter(ids)
        cached = self._references.get(sha256) if self._references else None
        mode = self._mode(is_cached=cached is not None)
        text = _TextInProgress(ids, sha256, mode, activations, cached=cached)
        if mode is Mode.REFERENCE_COMPUTED:
            text.reference = self._enter(ids, self._original)
        elif cached is not None and mode is Mode.UNQUANTIZED_CACHED:
            activations.hidden = list(cached.split(self._batch_size))
        if self._original is not None:
            text.head = text.reference or self._enter(ids[: self._batch_size], self._original)
        elif self._blocks is None and self._references is not None:
            text.rounded = self._enter(ids)
        return text

    def _mode(self, *, is_cached: bool) -> Mode:
        if self._blocks is None and self._original is None:
            return Mode.UNQUANTIZED_CACHED if is_cached else Mode.UNQUANTIZED
        if self._references is None:
            return Mode.QUANTIZED
        return Mode.REFERENCE_CACHED if is_cached else Mode.REFERENCE_COMPUTED

    def _enter(self, ids: Tensor, source: BlockSource | None = None) -> BlockActivations:
        """A text's activations before the first block, of the model that is measured unless another is given."""
        return BlockActivations(source or self._source, ids, self._batch_size, memory=self._memory)

    def _pass_original(self, texts: dict[str, _TextInProgress]) -> None:
        """Send what is not cached of the original through its own blocks."""
        if self._original is None or not any(text.reference for text in texts.values()):
            return
        for index in range(len(self._original.blocks)):
            with self._original.open_block(index):
                for name, text in texts.items():
                    if text.reference:
                        self._advance(text.reference, index, f"{name} unquantized")

    def _pass_block(self, texts: dict[str, _TextInProgress], index: int) -> None:
        """Send all texts through one block; the unquantized model first, because replacing the weights overwrites them."""
        with self._source.open_block(index) as block:
            for name, text in texts.items():
                if text.reference and self._original is None:
                    self._advance(text.reference, index, f"{name} unquantized")
            if self._blocks is not None:
                replace_weights(block, self._blocks.layers(index, str(self._source.device)))
            for name, text in texts.items():
                if text.mode is not Mode.UNQUANTIZED_CACHED:
                    self._advance(text.activations, index, name)
                if text.rounded:
                    self._advance(text.rounded, index, f"{name} rounded")
                    self._round_once_more(text.rounded, index)

    def _round_once_more(self, activations: BlockActivations, index: int) -> None:
        for place, hidden in enumerate(activations.hidden):
            activations.hidden[place].copy_(rounded_once_more(hidden, seed=index * len(activations.hidden) + place))

    def _advance(self, activations: BlockActivations, index: int, name: str) -> None:
        before, windows = self._bar.done, sum(map(len, activations.hidden))
        where = f"block {index + 1}/{len(self._source.blocks)}  {name}"

        def on_batch(batches: int) -> None:
            passed = sum(map(len, activations.hidden[:batches]))
            self._bar(f"{where}, window {passed} of {windows}", before + passed)

        activations.on_batch = on_batch
        smaller = self._memory.smaller_batches(activations.batch_size)
        what = f"while block {index} was evaluated"
        self._memory.retry(what, lambda: activations.advance(index), smaller, activations.to_host)

    def _measure(self, name: str, text: _TextInProgress) -> dict[str, list[float]]:
        """Measure a text whose activations have left the last block: logits and losses, a few windows at a time."""
        reference = self._reference(text)
        rows = windows_at_once(self._source, text.ids.shape[1])
        measured: dict[str, list[float]] = {}
        first, before = 0, self._bar.done
        for batch in text.activations.hidden:
            for hidden in batch.split(rows):
                here = slice(first, first := first + len(hidden))
                logits = text.activations.logits(hidden)
                expected = None if reference is None else text.reference_logits(reference[here])
                ids = text.ids[here].to(logits.device)
                for measure, values in self._of_windows(text, logits, ids, expected, here).items():
                    measured.setdefault(measure, []).extend(values.tolist())
                self._bar(f"{name}, window {first} of {len(text.ids)}", before + first)
        return measured

    def _of_windows(
        self, text: _TextInProgress, logits: Tensor, ids: Tensor, expected: Tensor | None, here: slice
    ) -> dict[str, Tensor]:
        """What is measured of the windows `here`, from their logits and, if there are any, those to compare with."""
        if text.rounded is None:
            return measure_windows(logits, ids, expected, text.agreement)
        sizes = [len(hidden) for hidden in text.rounded.hidden]
        batch, place = divmod(here.start, sizes[0])  # all batches but the last are of one size
        rounded = text.rounded.logits(text.rounded.hidden[batch][place : place + len(ids)])
        floor = measure_windows(rounded, ids, logits)
        return measure_windows(logits, ids) | {KL_FLOOR: floor["kl"], TOP1_FLOOR: floor["top1"]}

    def _reference(self, text: _TextInProgress) -> Tensor | None:
        """Final activations that a text is compared with. Those of the unquantized model are kept if they are new."""
        match text.mode:
            case Mode.UNQUANTIZED:
                if self._references is not None:
                    self._keep(text.sha256, text.activations)
                return None
            case Mode.REFERENCE_COMPUTED:
                assert text.reference is not None, "the mode says so"
                return self._keep(text.sha256, text.reference)
            case Mode.REFERENCE_CACHED:
                return text.cached
            case Mode.UNQUANTIZED_CACHED | Mode.QUANTIZED | Mode.PROBE:
                return None

    def _keep(self, sha256: str, unquantized: BlockActivations) -> Tensor:
        """Final activations (windows, length, width) in host memory, put into the cache for other runs."""
        assert self._references is not None, "the mode says so"
        final = torch.cat([hidden.cpu() for hidden in unquantized.hidden])
        self._references.put(sha256, final)
        return final


def windows_at_once(source: BlockSource, length: int) -> int:
    """Windows of `length` tokens whose logits fit into LOGITS_BYTES; at least one."""
    vocabulary = source.model.config.get_text_config().vocab_size
    return max(1, int(LOGITS_BYTES[source.device.type] / (4 * vocabulary * length)))  # 4 bytes per float32

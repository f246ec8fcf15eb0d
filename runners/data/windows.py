"""Perplexity under a named protocol.

A text is its documents joined and tokenized once, cut into windows without overlap, the tail dropped. The perplexity is
the exponential of the mean negative log-likelihood of the tokens, of which a window of T has T - 1 (GPTQ's protocol:
https://github.com/IST-DASLab/gptq). The name of the protocol is kept with the number, and so is the hash of the tokens.
"""

from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.data.datasets import Dataset
from runners.data.token_ids import encode, ids_hash
from runners.errors import InputError, MissingData
from runners.identity import counts_if


@dataclass(frozen=True)
class Text:
    """A text to measure perplexity on: which documents, joined by what, and how many windows of it.

    Attributes:
        protocol: the name under which the field knows this choice; it is stored with every number.
        max_documents: take only the first so many documents; None: all.
        max_windows: take only the first so many windows; None: all.
    """

    protocol: str
    dataset: Dataset
    join: str = "\n\n"
    max_documents: int | None = None
    max_windows: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """One file of `conf/evaluation/`.

    Attributes:
        texts: what perplexity is measured on.
        tasks: what zero-shot accuracy is measured on: names of lm-eval, or the bundled task.
        limit: take only the first so many questions of a task; None: all.
        skip_missing: skip a text whose data set cannot be had, and say so in the results, where the run would fail. (A
            task that is not to be had never stops a run.)
        agreement: compare the next-token distribution with the unquantized model's on every text.
    """

    texts: dict[str, Text]
    # Added after results had been published: without tasks, an evaluation has the identity that it had before.
    tasks: tuple[str, ...] = field(default=(), metadata=counts_if(lambda evaluation: evaluation.tasks))
    limit: int | None = field(default=None, metadata=counts_if(lambda evaluation: evaluation.tasks))
    skip_missing: bool = field(default=False, metadata=counts_if(lambda evaluation: evaluation.skip_missing))
    agreement: bool = True

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 or null, not {self.limit}")
        if repeated := [name for name in self.tasks if self.tasks.count(name) > 1]:
            raise ValueError(f"tasks names {repeated[0]} twice")


@dataclass(frozen=True)
class Windows:
    """A text as the model will see it, and how it came about.

    Attributes:
        ids: token ids (windows, length).
        protocol: the protocol's name, with what deviates from it.
        tokens: tokens of the whole text, before windows were cut.
    """

    ids: Tensor
    protocol: str
    tokens: int

    @property
    def sha256(self) -> str:
        return ids_hash(self.ids)


def cut_texts(
    evaluation: Evaluation, tokenizer: PreTrainedTokenizerBase, length: int, data_root: str | None
) -> tuple[dict[str, Windows], dict[str, str]]:
    """All evaluation texts, cut into windows; and why any was skipped, where that is allowed.

    Raises:
        InputError: as `cut_windows` does.
    """
    windows, skipped = {}, {}
    for name, text in evaluation.texts.items():
        try:
            windows[name] = cut_windows(name, text, tokenizer, length, data_root)
        except MissingData as error:
            if not evaluation.skip_missing:
                raise
            skipped[name] = str(error)
    return windows, skipped


def cut_windows(
    name: str, text: Text, tokenizer: PreTrainedTokenizerBase, length: int, data_root: str | None
) -> Windows:
    """Tokenize one evaluation text and cut it into windows of `length` tokens.

    Raises:
        InputError: the data set cannot be had, or is shorter than one window.
    """
    rows = text.dataset.rows(data_root)
    protocol = text.protocol
    if text.max_documents is not None:
        if len(rows) < text.max_documents:
            protocol += f" ({len(rows)} documents)"  # a sample of the data set: not the published protocol
        rows = rows[: text.max_documents]
    ids = encode(tokenizer, text.join.join(rows))
    count = len(ids) // length
    if count == 0:
        raise InputError(
            f"the text {name} has {len(ids)} tokens, fewer than one window of {length}: lower model.sequence_length or take "
            "another text"
        )
    count = min(count, text.max_windows or count)
    return Windows(ids[: count * length].reshape(count, length), protocol, len(ids))

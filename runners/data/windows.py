"""Evaluation texts as windows of token ids, under a named protocol.

A protocol says which documents are taken, what joins them, and how many windows are cut. The documents are joined and
tokenized once; the windows do not overlap, and the tail that fills no window is dropped. These are the rules of GPTQ's code
(https://github.com/IST-DASLab/gptq, datautils.py): `gptq` is its WikiText-2, `gptq-new` its `get_c4_new` and `get_ptb_new`.

Another join, another count or another window length gives another perplexity of the same model on the same documents. So
the protocol's name and the hash of the token ids are stored with every perplexity.
"""

from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.data.bos import AUTO, TEXT, WINDOW, check_bos, deviation, resolve_bos, with_bos
from runners.data.datasets import Dataset
from runners.data.token_ids import encode, ids_hash
from runners.errors import InputError, MissingData
from runners.identity import counts_if
from runners.storage.cache import Cache


@dataclass(frozen=True)
class Text:
    """The protocol of one evaluation text.

    Attributes:
        protocol: the name under which the field knows this choice; it is stored with every perplexity.
        join: put between two documents.
        max_documents: take only the first documents, this many; None: all.
        max_windows: take only the first windows, this many; None: all.
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
        limit: ask only the first questions of a task, this many; None: all.
        skip_missing: skip a text whose data set is missing, and store the reason; otherwise the run fails. (A missing task
            never fails a run.)
        agreement: compare the next-token distribution with the unquantized model's on every text.
        bos: where the texts have the token that begins texts, see `runners.data.bos`.
    """

    texts: dict[str, Text]
    # Added after results had been published: without tasks, an evaluation has the identity that it had before.
    tasks: tuple[str, ...] = field(default=(), metadata=counts_if(lambda evaluation: evaluation.tasks))
    limit: int | None = field(default=None, metadata=counts_if(lambda evaluation: evaluation.tasks))
    skip_missing: bool = field(default=False, metadata=counts_if(lambda evaluation: evaluation.skip_missing))
    agreement: bool = True
    bos: str = field(default=AUTO, metadata=counts_if(lambda evaluation: evaluation.bos != AUTO))

    def __post_init__(self) -> None:
        check_bos(self.bos)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 or null, not {self.limit}")
        if repeated := [name for name in self.tasks if self.tasks.count(name) > 1]:
            raise ValueError(f"tasks names {repeated[0]} twice")


@dataclass(frozen=True)
class Windows:
    """The windows of one text, and how they were made.

    Attributes:
        ids: token ids (windows, length).
        protocol: the protocol's name, followed by any deviation from it.
        tokens: tokens of the whole text, before windows were cut.
        bos: `text`: the tokenizer has added a token before the text, which the first window alone has; `window`: every
            window begins with it; or `none`.
    """

    ids: Tensor
    protocol: str
    tokens: int
    bos: str = "none"

    @property
    def sha256(self) -> str:
        """Hash of the ids: only perplexities of the same hash may be compared."""
        return ids_hash(self.ids)


def cut_texts(
    evaluation: Evaluation,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    data_root: str | None,
    model_type: str = "",
    cache: Cache | None = None,
) -> tuple[dict[str, Windows], dict[str, str]]:
    """Cut all evaluation texts into windows of `length` tokens.

    Args:
        model_type: of the model's config, which decides where BOS is with `evaluation.bos=auto`.
        cache: for the ids of long texts, as for `encode`.

    Returns:
        The windows by the text's name; and for each text that was skipped the reason, in a sentence.

    Raises:
        MissingData: a data set is missing, and `evaluation.skip_missing` is off.
        InputError: as for `cut_windows`.
    """
    windows, skipped = {}, {}
    bos = resolve_bos(evaluation.bos, tokenizer, model_type)
    for name, text in evaluation.texts.items():
        try:
            windows[name] = cut_windows(name, text, tokenizer, length, data_root, bos, cache)
        except MissingData as error:
            if not evaluation.skip_missing:
                raise
            skipped[name] = str(error)
    return windows, skipped


def cut_windows(
    name: str,
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    data_root: str | None,
    bos: str | None = None,
    cache: Cache | None = None,
) -> Windows:
    """Tokenize one evaluation text and cut it into windows of `length` tokens.

    Args:
        bos: `text`, `window` or `none`; None: what the papers have, `text` where the tokenizer adds BOS.
        cache: as for `encode`.

    Raises:
        MissingData: the data set is missing.
        InputError: the data set is damaged, the tokenizer cannot read it, or it is shorter than one window.
    """
    bos = bos or resolve_bos(TEXT, tokenizer, "")
    rows = text.dataset.rows(data_root)
    protocol = text.protocol
    if text.max_documents is not None:
        if len(rows) < text.max_documents:
            protocol += f" ({len(rows)} documents)"  # fewer than published: not comparable under the bare name
        rows = rows[: text.max_documents]
    # Joined first, then tokenized, as in GPTQ's code: a tokenizer may merge characters across the join, and it adds a BOS
    # token once, not once per document.
    ids = encode(tokenizer, text.join.join(rows), special=bos == TEXT, cache=cache)
    own = length - (bos == WINDOW)  # tokens of the text in a window
    count = len(ids) // own  # the tail is dropped: a shorter window would predict its tokens from less context
    if count == 0:
        raise InputError(
            f"the text {name} has {len(ids)} tokens, fewer than one window of {length}: lower model.sequence_length or take "
            "another text"
        )
    count = min(count, text.max_windows or count)
    windows = ids[: count * own].reshape(count, own)
    windows = with_bos(windows, tokenizer) if bos == WINDOW else windows
    return Windows(windows, protocol + deviation(bos, tokenizer), len(ids), bos)

"""Draw the calibration sequences from a split that is never evaluated, and others to measure layer errors on.

The draw depends on the text, the tokenizer, the length, `num_sequences` and the seed, and on nothing else, so every method
of a study calibrates on the same tokens. The hash of the tokens is stored with the results.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.data.bos import AUTO, NONE, TEXT, WINDOW, check_bos, resolve_bos, with_bos
from runners.data.datasets import Dataset
from runners.data.token_ids import encode, ids_hash
from runners.errors import InputError
from runners.identity import counts_if
from runners.results.metrics import LENGTH_ONE, UNIFORM
from runners.storage.cache import Cache

FEW_DISTINCT = 0.5  # share of the calibration tokens that are distinct, below which the draw is said to repeat itself

Encoder = Callable[[str], Tensor]  # a text to its token ids


@dataclass(frozen=True)
class Calibration:
    """One file of `conf/calibration/`.

    Attributes:
        sampling: `documents` draws a random window of a random document that is long enough (GPTQ's rule for C4);
            `joined` a random window of all documents joined by `join` (GPTQ's rule for WikiText-2 and PTB).
        num_sequences: how many sequences to draw. 128 is the number in the papers of GPTQ and QuantEase.
        true_sequential: solve the later layers of a decoder block on the outputs of its earlier, already quantized layers;
            otherwise every layer of a decoder block is solved on the unquantized block (the published protocol).
        inputs: `quantized`: a decoder block receives the outputs of the quantized blocks before it (the published
            protocol); `full_precision`: those of the unquantized blocks, which do not depend on the method, so they are
            computed once for all methods.
        held_out: how many further sequences to draw: layer errors are measured on them, nothing is calibrated on them.
        token_weights: `uniform`: the Hessian is a plain sum over the tokens (the published choice), so tokens with large
            inputs rule it; `length_one`: every token's input is scaled to length one first, so all tokens count alike.
        bos: where the sequences have the token that begins texts, see `runners.data.bos`; with `text` a document has it, or
            all joined documents, so only a sequence from its very beginning.
    """

    name: str
    dataset: Dataset
    sampling: str
    join: str = "\n\n"
    num_sequences: int = 128
    true_sequential: bool = False
    inputs: str = "quantized"
    held_out: int = 16
    # Added after results had been published.
    token_weights: str = field(default=UNIFORM, metadata=counts_if(lambda calibration: calibration.scales_tokens))
    bos: str = field(default=AUTO, metadata=counts_if(lambda calibration: calibration.bos != AUTO))

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "full_precision"):
            raise ValueError(f"inputs must be quantized or full_precision, not {self.inputs}")
        if self.inputs == "full_precision" and self.true_sequential:
            raise ValueError("true_sequential=true needs inputs=quantized: later layers see the earlier ones quantized")
        check_bos(self.bos)
        if self.token_weights not in (UNIFORM, LENGTH_ONE):
            raise ValueError(f"token_weights must be {UNIFORM} or {LENGTH_ONE}, not {self.token_weights}")
        if self.held_out < 0:
            raise ValueError(f"held_out must not be negative, not {self.held_out}")
        if self.sampling not in ("documents", "joined"):
            raise ValueError(f"sampling must be documents or joined, not {self.sampling}")
        if self.num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, not {self.num_sequences}")

    @property
    def scales_tokens(self) -> bool:
        """Whether the input of every token is scaled to length one."""
        return self.token_weights == LENGTH_ONE


@dataclass(frozen=True)
class Sequences:
    """Token ids (sequences, length), int64.

    Attributes:
        used: to calibrate on.
        held_out: from other places of the same text, to measure layer errors on; None: no such sequences.
        documents: of how many documents `used` is; None: of all documents joined.
        distinct_tokens: of `used`: tokens at different places of the text. Windows that are drawn twice, or overlap, have
            fewer of them than tokens.
        bos: `text`, `window` or `none`, see `runners.data.bos`.
        notes: what the data set was too small for, in sentences.
    """

    used: Tensor
    held_out: Tensor | None
    documents: int | None = None
    distinct_tokens: int = 0
    bos: str = NONE
    notes: tuple[str, ...] = ()

    @property
    def all(self) -> list[Tensor]:
        """`used`, and `held_out` unless it is None."""
        return [self.used] if self.held_out is None else [self.used, self.held_out]

    @property
    def sha256(self) -> str:
        """Hash of `used` alone: the held-out sequences change no weight."""
        return ids_hash(self.used)


@dataclass
class _Draw:
    """Windows of the text, and where each begins: the number of its document (0 for all joined) and a position in it."""

    windows: list[Tensor] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)

    @property
    def documents(self) -> set[int]:
        """The numbers of the documents that the windows are from."""
        return {row for row, _ in self.places}

    @property
    def without_repeats(self) -> "_Draw":
        """Every place once: a window that is held out twice tells nothing more."""
        first = dict(zip(reversed(self.places), reversed(self.windows), strict=True))
        places = list(dict.fromkeys(self.places))
        return _Draw([first[place] for place in places], places)

    def distinct(self, length: int) -> int:
        """How many places of the text the windows cover."""
        covered = 0
        end = (-1, 0)  # of what is covered so far: a document and a position in it
        for row, start in sorted(self.places):
            first = max(start, end[1]) if row == end[0] else start
            covered += start + length - first
            end = (row, start + length)
        return covered


def draw_sequences(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    data_root: str | None,
    model_type: str = "",
    cache: Cache | None = None,
) -> Sequences:
    """Draw the calibration sequences and the held-out sequences.

    `used` does not depend on how many sequences are held out, because those are drawn last. Where the text is too small to
    hold out so many, fewer are, and `notes` says so.

    Args:
        length: tokens per sequence.
        seed: of Python's generator; each seed is another draw. A `data_root` of None is the hub.
        model_type: of the model's config, which decides where BOS is with `calibration.bos=auto`.
        cache: for the ids of long texts, as for `encode`.

    Raises:
        MissingData: the data set is missing.
        InputError: the data set is damaged or too short, or the tokenizer cannot read it.
    """
    rows = calibration.dataset.rows(data_root)
    # A generator of its own, because the draw must not depend on what else uses the global one. Python's, as in GPTQ's code.
    generator = random.Random(seed)
    bos = resolve_bos(calibration.bos, tokenizer, model_type)
    encoder = partial(encode, tokenizer, special=bos == TEXT, cache=cache)
    own = length - (bos == WINDOW)  # tokens of the text in a sequence
    by_document = calibration.sampling == "documents"
    used, held_out = (_from_documents if by_document else _from_all)(rows, calibration, encoder, own, generator)
    held_out = held_out.without_repeats
    tensors = [torch.stack(draw.windows) if draw.windows else None for draw in (used, held_out)]
    first, second = (with_bos(t, tokenizer) if t is not None and bos == WINDOW else t for t in tensors)
    assert first is not None, "num_sequences is at least 1"
    documents = len(used.documents) if by_document else None
    distinct, drawn = used.distinct(own), len(used.windows) * own
    notes = _notes(calibration, documents, distinct / drawn, len(held_out.windows))
    return Sequences(first, second, documents, distinct, bos, notes)


def _notes(calibration: Calibration, documents: int | None, distinct: float, held_out: int) -> tuple[str, ...]:
    """What is said of a draw from a small data set: fewer documents than sequences, or half of the tokens drawn twice."""
    notes = []
    wanted, name = calibration.num_sequences, f"calibration={calibration.name}"
    if documents is not None and documents < wanted:
        notes.append(
            f"{name}: {wanted} sequences are from {documents} documents, {distinct:.0%} of their tokens distinct"
        )
    elif distinct < FEW_DISTINCT:
        notes.append(f"{name}: of the tokens of {wanted} sequences {distinct:.0%} are distinct")
    if held_out < calibration.held_out:
        notes.append(
            f"{name}: {held_out} of {calibration.held_out} sequences are held out, the text has no more that calibration "
            "does not see" + "; layer errors on unseen tokens are not measured" * (held_out == 0)
        )
    return tuple(notes)


def _from_all(
    rows: list[str], calibration: Calibration, encoder: Encoder, length: int, generator: random.Random
) -> tuple[_Draw, _Draw]:
    """Random windows of all documents joined, with replacement as in GPTQ's code.

    Windows of `used` may overlap each other. The held-out windows share no token with them, because an error measured on
    tokens that the weights were fitted to would be too low.
    """
    ids = encoder(calibration.join.join(rows))
    if len(ids) < calibration.num_sequences * length:
        fit = f" to {len(ids) // length}" if len(ids) >= length else ""
        raise InputError(
            f"calibration={calibration.name} has {len(ids)} tokens, fewer than the {calibration.num_sequences} sequences of "
            f"{length} that are asked for: lower calibration.num_sequences{fit} or model.sequence_length, or take another "
            "text"
        )
    free = torch.ones(len(ids) - length + 1, dtype=torch.bool)  # where a held-out window may begin
    starts = [generator.randrange(len(free)) for _ in range(calibration.num_sequences)]
    for start in starts:  # a window that begins less than `length` before or after this one would overlap it
        free[max(0, start - length + 1) : start + length] = False
    places = free.nonzero().flatten().tolist()
    others = [places[generator.randrange(len(places))] for _ in range(calibration.held_out)] if places else []
    used, held_out = (
        _Draw([ids[start : start + length] for start in some], [(0, start) for start in some])
        for some in (starts, others)
    )
    return used, held_out


def _from_documents(
    rows: list[str], calibration: Calibration, encoder: Encoder, length: int, generator: random.Random
) -> tuple[_Draw, _Draw]:
    """GPTQ's rule for C4 (`get_c4` in its datautils.py): a random window of a random document that is long enough.

    Unlike there, no document is drawn twice before every document has been tried, so a small data set is used evenly. The
    held-out windows are from documents of which no window was drawn for `used`.
    """
    order = list(range(len(rows)))
    used = _windows_of(rows, order, calibration.num_sequences, encoder, length, generator)
    if len(used.windows) < calibration.num_sequences:
        raise InputError(
            f"no document of calibration={calibration.name} is longer than a sequence of {length} tokens: lower "
            "model.sequence_length, or take another text"
        )
    rest = [row for row in order if row not in used.documents]
    return used, _windows_of(rows, rest, calibration.held_out, encoder, length, generator)


def _windows_of(
    rows: list[str],
    order: list[int],
    count: int,
    encoder: Encoder,
    length: int,
    generator: random.Random,
) -> _Draw:
    """Draw one window per document, in random order, again from the first when all documents were tried.

    Args:
        order: numbers of the documents to draw from; shuffled in place before every round.

    Returns:
        `count` windows, or none if no document is long enough.
    """
    draw = _Draw()
    while len(draw.windows) < count:
        generator.shuffle(order)
        found = len(draw.windows)
        for row in order:
            ids = encoder(rows[row])
            # Longer than a sequence, not equal: GPTQ's code accepts a document of exactly `length` tokens, and then its
            # `randint(0, len - length - 1)` fails because the range is empty. For longer ones the range is the same.
            if len(ids) > length:
                start = generator.randrange(len(ids) - length)
                draw.windows.append(ids[start : start + length])
                draw.places.append((row, start))
            if len(draw.windows) == count:
                break
        if len(draw.windows) == found:
            break  # a whole round without a document that is long enough: another round would find none either
    return draw

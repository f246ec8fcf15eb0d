"""Draw the calibration sequences: seeded, from a split that is never evaluated."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.data.datasets import Dataset
from runners.data.token_ids import encode, ids_hash
from runners.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """One file of `conf/calibration/`.

    Attributes:
        sampling: `documents` draws a random window within a random document that is long enough (GPTQ's rule for C4),
            `joined` a random window of all documents joined by `join`.
        num_sequences: how many sequences to draw.
        true_sequential: the layers of a block that run later are solved on what the earlier, already quantized ones
            feed them; otherwise all layers of a block see the block as it was (the published protocol).
        inputs: `quantized`: a block sees what the quantized blocks before it feed it (the published protocol);
            `full_precision`: what the unquantized ones do, which is the same for all methods and computed once for all.
        held_out: how many more sequences to draw, on which the layers' errors are measured but nothing is calibrated.
    """

    name: str
    dataset: Dataset
    sampling: str
    join: str = "\n\n"
    num_sequences: int = 128
    true_sequential: bool = False
    inputs: str = "quantized"
    held_out: int = 16

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "full_precision"):
            raise ValueError(f"inputs must be quantized or full_precision, not {self.inputs}")
        if self.inputs == "full_precision" and self.true_sequential:
            raise ValueError("true_sequential=true needs inputs=quantized: later layers see the earlier ones quantized")
        if self.held_out < 0:
            raise ValueError(f"held_out must not be negative, not {self.held_out}")
        if self.sampling not in ("documents", "joined"):
            raise ValueError(f"sampling must be documents or joined, not {self.sampling}")
        if self.num_sequences < 1:
            raise ValueError(f"num_sequences must be at least 1, not {self.num_sequences}")


@dataclass(frozen=True)
class Sequences:
    """Token ids (sequences, length), int64.

    Attributes:
        used: to calibrate on.
        held_out: from other places of the same text, to measure the layers' errors on; None: there are none.
    """

    used: Tensor
    held_out: Tensor | None

    @property
    def all(self) -> list[Tensor]:
        """Both kinds, those that there are."""
        return [self.used] if self.held_out is None else [self.used, self.held_out]

    @property
    def sha256(self) -> str:
        """Of the sequences that are calibrated on."""
        return ids_hash(self.used)


def draw_sequences(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    data_root: str | None,
) -> Sequences:
    """The calibration sequences, and beside them those that are held out: which ones does not touch the others.

    Raises:
        InputError: the data set cannot be had, or is too short.
    """
    rows = calibration.dataset.rows(data_root)
    generator = random.Random(seed)
    draw = _from_documents if calibration.sampling == "documents" else _from_all
    used, held_out = draw(rows, calibration, tokenizer, length, generator)
    return Sequences(torch.stack(used), torch.stack(held_out) if held_out else None)


def _from_all(
    rows: list[str], calibration: Calibration, tokenizer: PreTrainedTokenizerBase, length: int, generator: random.Random
) -> tuple[list[Tensor], list[Tensor]]:
    """Random windows of all documents joined; those that are held out share no token with the others."""
    ids = encode(tokenizer, calibration.join.join(rows))
    if len(ids) < calibration.num_sequences * length:
        raise InputError(
            f"calibration={calibration.name} has {len(ids)} tokens, fewer than the {calibration.num_sequences} sequences of "
            f"{length} that are asked for: lower calibration.num_sequences or model.sequence_length, or take another text"
        )
    free = torch.ones(len(ids) - length + 1, dtype=torch.bool)  # where a window may begin
    starts = [generator.randrange(len(free)) for _ in range(calibration.num_sequences)]
    for start in starts:
        free[max(0, start - length + 1) : start + length] = False
    places = free.nonzero().flatten().tolist()
    if calibration.held_out and not places:
        raise too_short_to_hold_out(calibration)
    others = [places[generator.randrange(len(places))] for _ in range(calibration.held_out)]
    used, held_out = ([ids[start : start + length] for start in some] for some in (starts, others))
    return used, held_out


def _from_documents(
    rows: list[str], calibration: Calibration, tokenizer: PreTrainedTokenizerBase, length: int, generator: random.Random
) -> tuple[list[Tensor], list[Tensor]]:
    """GPTQ's rule for C4: a random document, if it is longer than a sequence, and a random window of it.

    Those that are held out are windows of documents that the others are not of.
    """
    order = list(range(len(rows)))
    used, taken = _windows_of(rows, order, calibration.num_sequences, tokenizer, length, generator)
    if len(used) < calibration.num_sequences:
        raise InputError(
            f"no document of calibration={calibration.name} is longer than a sequence of {length} tokens: lower "
            "model.sequence_length, or take another text"
        )
    rest = [row for row in order if row not in taken]
    held_out, _ = _windows_of(rows, rest, calibration.held_out, tokenizer, length, generator)
    if len(held_out) < calibration.held_out:
        raise too_short_to_hold_out(calibration)
    return used, held_out


def _windows_of(
    rows: list[str],
    order: list[int],
    count: int,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    generator: random.Random,
) -> tuple[list[Tensor], set[int]]:
    """`count` windows, or none if no document is long enough, and the documents that they are of."""
    sequences: list[Tensor] = []
    taken: set[int] = set()
    while len(sequences) < count:
        generator.shuffle(order)
        found = len(sequences)
        for row in order:
            ids = encode(tokenizer, rows[row])
            if len(ids) > length:  # longer, not as long: GPTQ's `randint(0, len - length - 1)` needs a place to choose
                start = generator.randrange(len(ids) - length)
                sequences.append(ids[start : start + length])
                taken.add(row)
            if len(sequences) == count:
                break
        if len(sequences) == found:
            break
    return sequences, taken


def too_short_to_hold_out(calibration: Calibration) -> InputError:
    """The error for a text of which nothing is left beside the calibration sequences."""
    return InputError(
        f"calibration={calibration.name} is too short to hold out {calibration.held_out} sequences that calibration does "
        "not see: lower calibration.held_out (0: none) or calibration.num_sequences, or take another text"
    )

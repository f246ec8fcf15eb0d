"""Draw the calibration sequences from a split that is never evaluated, and others to measure layer errors on.

The draw depends on the text, the tokenizer, the length, `num_sequences` and the seed, and on nothing else, so every method
of a study calibrates on the same tokens. The hash of the tokens is stored with the results.
"""

import random
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.data.datasets import Dataset
from runners.data.token_ids import encode, ids_hash
from runners.errors import InputError
from runners.identity import counts_if
from runners.results.metrics import LENGTH_ONE, UNIFORM


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

    def __post_init__(self) -> None:
        if self.inputs not in ("quantized", "full_precision"):
            raise ValueError(f"inputs must be quantized or full_precision, not {self.inputs}")
        if self.inputs == "full_precision" and self.true_sequential:
            raise ValueError("true_sequential=true needs inputs=quantized: later layers see the earlier ones quantized")
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
    """

    used: Tensor
    held_out: Tensor | None

    @property
    def all(self) -> list[Tensor]:
        """`used`, and `held_out` unless it is None."""
        return [self.used] if self.held_out is None else [self.used, self.held_out]

    @property
    def sha256(self) -> str:
        """Hash of `used` alone: the held-out sequences change no weight."""
        return ids_hash(self.used)


def draw_sequences(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    data_root: str | None,
) -> Sequences:
    """Draw the calibration sequences and the held-out sequences.

    `used` does not depend on how many sequences are held out, because those are drawn last.

    Args:
        length: tokens per sequence.
        seed: of Python's generator; each seed is another draw.
        data_root: folder of data sets; None: the hub.

    Raises:
        MissingData: the data set is missing.
        InputError: the data set is damaged or too short, or the tokenizer cannot read it.
    """
    rows = calibration.dataset.rows(data_root)
    # A generator of its own, because the draw must not depend on what else uses the global one. Python's, as in GPTQ's code.
    generator = random.Random(seed)
    draw = _from_documents if calibration.sampling == "documents" else _from_all
    used, held_out = draw(rows, calibration, tokenizer, length, generator)
    return Sequences(torch.stack(used), torch.stack(held_out) if held_out else None)


def _from_all(
    rows: list[str], calibration: Calibration, tokenizer: PreTrainedTokenizerBase, length: int, generator: random.Random
) -> tuple[list[Tensor], list[Tensor]]:
    """Random windows of all documents joined, with replacement as in GPTQ's code.

    Windows of `used` may overlap each other. The held-out windows share no token with them, because an error measured on
    tokens that the weights were fitted to would be too low.
    """
    ids = encode(tokenizer, calibration.join.join(rows))
    if len(ids) < calibration.num_sequences * length:
        raise InputError(
            f"calibration={calibration.name} has {len(ids)} tokens, fewer than the {calibration.num_sequences} sequences of "
            f"{length} that are asked for: lower calibration.num_sequences or model.sequence_length, or take another text"
        )
    free = torch.ones(len(ids) - length + 1, dtype=torch.bool)  # where a held-out window may begin
    starts = [generator.randrange(len(free)) for _ in range(calibration.num_sequences)]
    for start in starts:  # a window that begins less than `length` before or after this one would overlap it
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
    """GPTQ's rule for C4 (`get_c4` in its datautils.py): a random window of a random document that is long enough.

    Unlike there, no document is drawn twice before every document has been tried, so a small data set is used evenly. The
    held-out windows are from documents of which no window was drawn for `used`.
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
    """Draw one window per document, in random order, again from the first when all documents were tried.

    Args:
        order: numbers of the documents to draw from; shuffled in place before every round.

    Returns:
        `count` windows, none if no document is long enough, and the numbers of the documents that they are from.
    """
    sequences: list[Tensor] = []
    taken: set[int] = set()
    while len(sequences) < count:
        generator.shuffle(order)
        found = len(sequences)
        for row in order:
            ids = encode(tokenizer, rows[row])
            # Longer than a sequence, not equal: GPTQ's code accepts a document of exactly `length` tokens, and then its
            # `randint(0, len - length - 1)` fails because the range is empty. For longer ones the range is the same.
            if len(ids) > length:
                start = generator.randrange(len(ids) - length)
                sequences.append(ids[start : start + length])
                taken.add(row)
            if len(sequences) == count:
                break
        if len(sequences) == found:
            break  # a whole round without a document that is long enough: another round would find none either
    return sequences, taken


def too_short_to_hold_out(calibration: Calibration) -> InputError:
    """The error for a text that has nothing left for held-out sequences once the calibration sequences are drawn."""
    return InputError(
        f"calibration={calibration.name} is too short to hold out {calibration.held_out} sequences that calibration does "
        "not see: lower calibration.held_out (0: none) or calibration.num_sequences, or take another text"
    )

"""Draw the calibration sequences: seeded, from a split that is never evaluated."""

import random
from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.errors import InputError
from runners.schema import Calibration


def draw_sequences(
    calibration: Calibration,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    data_root: str | None,
) -> Tensor:
    """The calibration sequences, int64 (sequences, length).

    Raises:
        InputError: the data set cannot be had, or is too short.
    """
    rows = calibration.dataset.rows(data_root)
    generator = random.Random(seed)
    if calibration.sampling == "documents":
        return _from_documents(rows, calibration, tokenizer, length, generator)
    ids = encode(tokenizer, calibration.join.join(rows))
    if len(ids) < calibration.num_sequences * length:
        raise InputError(
            f"calibration={calibration.name} has {len(ids)} tokens, fewer than the {calibration.num_sequences} sequences of "
            f"{length} that are asked for: lower calibration.num_sequences or model.sequence_length, or take another text"
        )
    starts = [generator.randrange(len(ids) - length + 1) for _ in range(calibration.num_sequences)]
    return torch.stack([ids[start : start + length] for start in starts])


def _from_documents(
    rows: list[str], calibration: Calibration, tokenizer: PreTrainedTokenizerBase, length: int, generator: random.Random
) -> Tensor:
    """GPTQ's rule for C4: a random document, if it is longer than a sequence, and a random window of it."""
    order = list(range(len(rows)))
    sequences: list[Tensor] = []
    while len(sequences) < calibration.num_sequences:
        generator.shuffle(order)
        found = len(sequences)
        for row in order:
            ids = encode(tokenizer, rows[row])
            if len(ids) > length:
                start = generator.randrange(len(ids) - length)
                sequences.append(ids[start : start + length])
            if len(sequences) == calibration.num_sequences:
                break
        if len(sequences) == found:
            raise InputError(
                f"no document of calibration={calibration.name} is longer than a sequence of {length} tokens: lower "
                "model.sequence_length, or take another text"
            )
    return torch.stack(sequences)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The ids of a text as the tokenizer makes them, special tokens included, int64 (tokens,).

    Raises:
        InputError: the tokenizer cannot read the text.
    """
    try:
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        raise InputError(f"the tokenizer in {tokenizer.name_or_path} cannot read the text: {error}") from error


def ids_hash(ids: Tensor) -> str:
    """The SHA-256 of token ids and their shape, so that two results can be known to rest on the same tokens."""
    return sha256(f"{tuple(ids.shape)}".encode() + ids.to(torch.int64).cpu().numpy().tobytes()).hexdigest()

"""Text to token ids, and the hash by which two results are known to use the same tokens."""

from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.errors import InputError


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """The ids of a text as the tokenizer makes them, special tokens included, int64 (tokens,).

    Special tokens stay, as in GPTQ's code: a tokenizer that adds a BOS token puts it once, before the whole text, so only
    the first window of a joined text has one.

    Raises:
        InputError: the tokenizer cannot read the text.
    """
    try:
        return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the Rust library `tokenizers` is not an Exception
        raise InputError(f"the tokenizer in {tokenizer.name_or_path} cannot read the text: {error}") from error


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids and their shape, in hexadecimal.

    The shape is part of it: the same tokens in windows of another length give another perplexity.
    """
    return sha256(f"{tuple(ids.shape)}".encode() + ids.to(torch.int64).cpu().numpy().tobytes()).hexdigest()

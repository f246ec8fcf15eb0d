"""Text to token ids, and the hash that shows whether two results used the same tokens."""

from hashlib import sha256

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.errors import InputError


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> Tensor:
    """Token ids of a text, int64 (tokens,).

    Args:
        special: keep the special tokens that the tokenizer adds, as GPTQ's code does: a tokenizer that adds a BOS token adds
            it once, before the whole text, so of a joined text only the first window has one.

    Raises:
        InputError: the tokenizer cannot encode the text.
    """
    try:
        return torch.tensor(tokenizer(text, add_special_tokens=special)["input_ids"], dtype=torch.int64)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the Rust library `tokenizers` is not an Exception
        raise InputError(f"the tokenizer in {tokenizer.name_or_path} cannot read the text: {error}") from error


def begins_with_special_token(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer adds a token, such as BOS, before every text.

    Of a text that is cut into windows only the first one then has it, which for some models makes all others far worse.
    """
    added, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return added[:1] != plain[:1]


def ids_hash(ids: Tensor) -> str:
    """SHA-256 of token ids of any shape, in hexadecimal.

    The shape is hashed too, because the same tokens in windows of another length give another perplexity. The ids are hashed
    as int64 in host memory, so neither device nor integer type changes the hash.
    """
    return sha256(f"{tuple(ids.shape)}".encode() + ids.to(torch.int64).cpu().numpy().tobytes()).hexdigest()

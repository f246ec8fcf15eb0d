"""Text to token ids, and the hash that shows whether two results used the same tokens."""

import importlib.metadata
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.errors import InputError
from runners.storage.cache import Cache

LONG = 2**18  # characters from which on ids are kept for other runs: a quarter of a second of tokenizing, at least


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True, cache: Cache | None = None) -> Tensor:
    """Token ids of a text, int64 (tokens,).

    Args:
        special: keep the special tokens that the tokenizer adds, as GPTQ's code does: a tokenizer that adds a BOS token adds
            it once, before the whole text, so of a joined text only the first window has one.
        cache: where the ids of a long text are kept for other runs; None: nowhere.

    Raises:
        InputError: the tokenizer cannot encode the text.
    """
    key = None if cache is None or len(text) < LONG else _key(tokenizer, text, special)
    if cache is None or key is None:
        return _encoded(tokenizer, text, special)
    if (known := cache.get(key, "cpu")) is not None:
        return known["ids"]
    ids = _encoded(tokenizer, text, special)
    cache.put(key, {"ids": ids})
    return ids


def _key(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> dict[str, Any] | None:
    """All that the ids depend on, by content; None: of a tokenizer written in Python, of which that is not known."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {
        "kind": "token ids",
        "text": sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "special": special,
        "tokenizer": sha256(f"{type(tokenizer).__name__} {backend.to_str()}".encode()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
    }


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Tensor:
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

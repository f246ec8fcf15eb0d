"""Where a text or a calibration sequence has the token that begins texts (BOS).

    text      once, before the whole text, where the tokenizer adds one by itself: the first window alone has it. The papers'
              numbers were measured with this.
    window    before every window, which is BOS and length - 1 tokens of the text
    none      nowhere

`auto`, the default, is `window` where the tokenizer adds a BOS by itself and the model is of a family that needs it before
whatever it reads, and `text` everywhere else. Gemma's models are such a family: their perplexity on a window without BOS is
several times that with it. For OPT, Llama and the others of the papers' tables a few per cent are at stake, and there the
published protocol decides.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from runners.data.token_ids import begins_with_special_token
from runners.errors import InputError
from runners.results.metrics import BOS_IN_EVERY_WINDOW, NO_BOS

AUTO, TEXT, WINDOW, NONE = "auto", "text", "window", "none"
SETTINGS = (AUTO, TEXT, WINDOW, NONE)
NEEDS_BOS = (
    "gemma"  # in the model_type of every model of the family: gemma, gemma2, gemma3_text, recurrent_gemma, vaultgemma
)


def check_bos(bos: str) -> None:
    """Refuse a setting that does not exist.

    Raises:
        ValueError: naming those that do.
    """
    if bos not in SETTINGS:
        raise ValueError(f"bos must be one of {', '.join(SETTINGS)}, not {bos}")


def resolve_bos(bos: str, tokenizer: PreTrainedTokenizerBase, model_type: str) -> str:
    """`text`, `window` or `none`: what a setting means for a tokenizer and a model.

    `text` becomes `none` where the tokenizer adds nothing.

    Raises:
        InputError: `window` is asked for, and the tokenizer has no BOS token.
    """
    adds = begins_with_special_token(tokenizer)
    if bos == WINDOW and tokenizer.bos_token_id is None:
        raise InputError("bos=window needs a BOS token, and the tokenizer has none: take bos=text or bos=none")
    if bos == AUTO:
        bos = WINDOW if adds and tokenizer.bos_token_id is not None and NEEDS_BOS in model_type else TEXT
    return bos if adds or bos != TEXT else NONE


def deviation(bos: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the name of a protocol says of `bos` (resolved) where it is not the published choice."""
    if bos == WINDOW:
        return BOS_IN_EVERY_WINDOW
    return NO_BOS if bos == NONE and begins_with_special_token(tokenizer) else ""


def with_bos(windows: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows (windows, length - 1) of token ids with BOS before each, (windows, length)."""
    first = torch.full((len(windows), 1), int(tokenizer.bos_token_id), dtype=windows.dtype)  # pyright: ignore[reportArgumentType]
    return torch.cat([first, windows], 1)


def probes(windows: Tensor, bos: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """One window (1, length) as it is and with BOS in place of its first token, by which both predict the same tokens.

    Args:
        windows: of a text (windows, length).
        bos: of that text, resolved.

    Returns:
        Both under `NONE` and `WINDOW`; {} where there is nothing to compare: every window has it, or there is no BOS.
    """
    if bos == WINDOW or tokenizer.bos_token_id is None:
        return {}
    plain = windows[1:2] if len(windows) > 1 else windows[:1]  # the first window of a text may have it
    if plain[0, 0] == tokenizer.bos_token_id:
        return {}
    return {NONE: plain, WINDOW: with_bos(plain[:, 1:], tokenizer)}

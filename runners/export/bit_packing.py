"""Codes in words of 32 bits, as both published layouts have them: without gaps, the first code in the lowest bits.

A code of 3 bits may begin in one word and end in the next. Source: compressed-tensors (`pack_to_int32`), AutoGPTQ (`pack`).
"""

import torch
from torch import Tensor

WORD = 32


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack the codes of each row.

    Args:
        codes: (rows, count), whole numbers of 0 to 2^bits - 1.
        bits: per code, 1 to 8.

    Returns:
        int32 (rows, ceil(count * bits / 32)); the last word ends in zeros.
    """
    rows, count = codes.shape
    words = -(-count * bits // WORD)
    # In int64, whose upper half takes what does not fit into a word, and is added to the next one.
    first = torch.arange(count, device=codes.device) * bits
    shifted = codes.to(torch.int64) << (first % WORD)
    found = torch.zeros(rows, words + 1, dtype=torch.int64, device=codes.device)
    found.index_add_(1, first // WORD, shifted & 0xFFFFFFFF)
    found.index_add_(1, first // WORD + 1, shifted >> WORD)
    low = found[:, :words]  # less than 2^32: no two codes share a bit
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).contiguous()


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack_words` has packed, int32 (rows, count)."""
    first = torch.arange(count, device=words.device) * bits
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    pairs = wide[:, first // WORD] | (wide[:, first // WORD + 1] << WORD)
    return ((pairs >> (first % WORD)) & (2**bits - 1)).to(torch.int32)

"""Codes of 2 to 8 bits in 32-bit words: a dense stream of bits, lowest first, which may cross from a word to the next.

Where the bits divide 32 this is the packing of all tools; of 3 bits, 32 codes in three words, it is that of GPTQ
(https://github.com/IST-DASLab/gptq, `Quant3Linear.pack`) and of today's compressed-tensors, whose older versions left bits
of a word empty instead (`unpack_separate`).
"""

import torch
from torch import Tensor

WORD = 32


def words_for(count: int, bits: int) -> int:
    """How many words hold `count` codes."""
    return -(-count * bits // WORD)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes in each row of words.

    Args:
        words: int32 (rows, words).
        bits: per code.
        count: codes of a row; the words must hold as many.

    Returns:
        uint8 (rows, count).
    """
    places = torch.arange(count, device=words.device) * bits
    word, shift = places // WORD, places % WORD
    unsigned = words.long() & 0xFFFFFFFF
    # The word after: what of a code is beyond the end of its word. The last one has none, and needs none.
    after = torch.nn.functional.pad(unsigned, (0, 1))
    whole = unsigned[:, word] >> shift | after[:, word + 1] << (WORD - shift)
    return (whole & ((1 << bits) - 1)).to(torch.uint8)


def unpack_separate(words: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack_words`, of words that hold 32 // bits codes each and are else empty: no code crosses."""
    shifts = torch.arange(WORD // bits, device=words.device) * bits
    codes = (words.long() & 0xFFFFFFFF)[:, :, None] >> shifts & ((1 << bits) - 1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The words that `unpack_words` reads.

    Args:
        codes: (rows, count), whole numbers of 0 to 2^bits - 1.
        bits: per code.

    Returns:
        int32 (rows, words); bits after the last code are zero.
    """
    places = torch.arange(codes.shape[1], device=codes.device) * bits
    words = words_for(codes.shape[1], bits)
    shifted = codes.long() << places % WORD  # in 64 bits: what is beyond the end of a word belongs to the next one
    found = torch.zeros(len(codes), words + 1, dtype=torch.int64, device=codes.device)
    found.index_add_(1, places // WORD, shifted & 0xFFFFFFFF)
    found.index_add_(1, places // WORD + 1, shifted >> WORD)
    unsigned = found[:, :words]  # less than 2^32, as no two codes share a bit
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32).contiguous()

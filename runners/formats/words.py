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

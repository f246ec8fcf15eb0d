"""The noise floor of a KL divergence: that between the unquantized model and itself, rounded once more.

Whatever a decoder block computes is rounded to the working dtype when it leaves the block. Kernels, batch sizes and
machines differ in these last bits, so two runs of one model have a KL above zero, and a difference between two methods that
is smaller than it tells nothing. Rounding an output again would change nothing, as it is rounded already; so every entry is
given another error of the size of a rounding: with probability 1/12 it moves to one of its two neighbors in the dtype, which
adds an error of mean zero and variance ulp^2 / 12, as rounding to nearest does.
"""

import torch
from torch import Tensor

SHARE = 1 / 12  # of the entries that move
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def rounded_once_more(hidden: Tensor, seed: int, share: float = SHARE) -> Tensor:
    """Activations whose entries have an independent rounding error more.

    Args:
        hidden: of any shape, floating-point.
        seed: the same seed moves the same entries, on the same kind of device.
        share: of the entries that move by one unit in the last place, half of them away from zero.

    Returns:
        A new tensor. Zeros, infinities, NaN, and the largest finite numbers stay as they are.
    """
    bits = hidden.contiguous().view(BITS[hidden.dtype])
    generator = torch.Generator(hidden.device).manual_seed(seed)
    drawn = torch.rand(hidden.shape, generator=generator, device=hidden.device)
    step = (drawn < share / 2).to(bits.dtype) - ((drawn >= share / 2) & (drawn < share)).to(bits.dtype)
    # Floating-point numbers of one sign are in the order of their bits, so a neighbor is one more or one less.
    moved = (bits + step).view(hidden.dtype)
    return torch.where(torch.isfinite(hidden) & torch.isfinite(moved) & (hidden != 0), moved, hidden)

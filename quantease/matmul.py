"""Matrix products on half-precision numbers that lose nothing, or next to nothing, of float32.

The product of two numbers with 11 bits each (float16), or 8 (bfloat16), has at most 22: it is exact in float32, so that
with float32 sums the product of half-precision matrices is as good as that of the same matrices in float32.
"""

import torch
from torch import Tensor


def product(first: Tensor, second: Tensor) -> Tensor:
    """The product of two half-precision matrices, summed in float32 and returned as float32."""
    if first.is_cuda:
        return torch.mm(first, second, out_dtype=torch.float32)
    return first.float() @ second.float()


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices whose sum is `matrix` (float32) to 16 bits."""
    large = matrix.bfloat16()
    return large, (matrix - large).bfloat16()


def add_second_moment(total: Tensor, x: Tensor, parts: int = 1) -> Tensor:
    """Add sum x x^T to `total` (in, in), float32, in place; in `parts` so that the product takes less beside it."""
    on_cuda = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    x = x if on_cuda else x.float()
    for rows, columns in zip(total.chunk(parts), x.T.chunk(parts), strict=True):
        if on_cuda:
            rows.add_(product(columns, x))
        else:
            rows.addmm_(columns, x)
    return total

"""Matrix products on half-precision numbers that lose nothing, or next to nothing, of float32.

The product of two numbers with 11 significant bits each (float16), or 8 (bfloat16), has at most 22. Float32 has 24, so it
is exact there, and with float32 sums the product of half-precision matrices is as good as that of the same matrices in
float32. On a GPU it runs on the tensor cores, many times faster.
"""

import torch
from torch import Tensor


def product(first: Tensor, second: Tensor) -> Tensor:
    """The product of two half-precision matrices, summed in float32 and returned as float32."""
    if first.is_cuda:
        # out_dtype: without it the sums are rounded to half precision, and nothing of the above holds.
        return torch.mm(first, second, out_dtype=torch.float32)
    return first.float() @ second.float()


def split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Two bfloat16 matrices whose sum is `matrix` (float32) to 16 bits.

    bfloat16 and not float16: it has float32's exponents, so that neither half overflows or vanishes, whatever the scale
    of the Hessian, and the rounding error of the first half (at most 2^-8 of it) is held by the second.
    """
    large = matrix.bfloat16()
    return large, (matrix - large).bfloat16()


def add_second_moment(total: Tensor, x: Tensor, parts: int = 1) -> Tensor:
    """Add sum x x^T to `total` (in, in), float32, in place.

    Args:
        total: the Hessian so far.
        x: (tokens, in), activations in the dtype of the model.
        parts: slices of the rows of `total` that are added one after the other. On a GPU the product is a matrix of its
            own before it is added; with more parts it takes less memory.
    """
    return add_cross_moment(total, x, x, parts)


def add_cross_moment(total: Tensor, first: Tensor, second: Tensor, parts: int = 1) -> Tensor:
    """Add sum x y^T to `total` (in, in), float32, in place, for x and y in the rows of `first` and `second` (tokens, in).

    Args:
        total: the sum so far.
        first: in the dtype of `second`.
        second: activations in the dtype of the model.
        parts: as for `add_second_moment`.
    """
    # Half-precision inputs are exact in `product`. Others, and all on a CPU, are summed in float32 in place.
    on_cuda = second.is_cuda and second.dtype in (torch.float16, torch.bfloat16)
    first, second = (first, second) if on_cuda else (first.float(), second.float())
    for rows, columns in zip(total.chunk(parts), first.T.chunk(parts), strict=True):
        if on_cuda:
            rows.add_(product(columns, second))
        else:
            rows.addmm_(columns, second)
    return total

"""The pass over the columns of one column block, in which coordinate descent, GPTQ and SpQR spend their time.

Columns are taken in order; each is rounded to the grid, and its change is propagated to the columns after it. Rows are
independent, so a fast form takes many rows at once and keeps a block close to the processor. There are three forms of
the one pass: `plain` in torch, which defines it, runs everywhere and is what the others are tested against; `cpu`, with
numba; `cuda`, with Triton.

Everything is in the transposed layout (block, out), in which a column of the layer is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.kernels import plain


@dataclass(frozen=True, eq=False)
class Columns:
    """The grid of a block of input columns.

    Attributes:
        scale: (groups, out), positive.
        zero: (groups, out); may be fractional. Not looked at where there are levels.
        group: (block,), int32, the row of `scale` and `zero` that belongs to each column.
        max_code: codes are 0 to `max_code`.
        levels: (max_code + 1,), in rising order: a value is scale * level. None: it is scale * (code - zero).
        thresholds: (max_code,), what a value over its scale must exceed for each level but the lowest.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    max_code: int
    levels: Tensor | None = None
    thresholds: Tensor | None = None

    def __getitem__(self, part: slice) -> "Columns":
        """The grid of some of the columns."""
        return replace(self, group=self.group[part])


def run_block(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: Columns | None,
    curvature: Tensor | None = None,
    limit: Tensor | None = None,
) -> None:
    """Take the columns of one block in order, all in place.

    With a curvature it is coordinate descent: column j moves to values_j + work_j / curvature_j, rounded. Without one it
    is GPTQ's error feedback: column j is work_j, rounded. Then work_k -= coupling_jk * change_j for the columns k after
    it, where the change is the new value minus the old one (descent) or minus the unrounded one (feedback).

    Both are one recursion: a target from `work`, a rounding, and a rank-one update of the rest of `work`. In descent
    `work` is H D and coupling is H: moving column j by d changes D_j by -d and so (H D)_k by -H_kj d. In feedback `work`
    is the weight and coupling is -U_jk / U_jj (quantease/cholesky.py).

    Args:
        values: (block, out). The present values, which feedback does not look at; afterwards the new ones.
        work: (block, out). H D of the block (descent), or its compensated weights (feedback); afterwards the changes.
        coupling: (block, block).
        columns: the grid to round to; None: no rounding (a relaxed sweep).
        curvature: (block,), positive.
        limit: (block,). A weight whose squared rounding error is larger stays unrounded, with a change of zero.
    """
    _form(values)(values, work, coupling, columns, curvature, limit)


def _form(values: Tensor) -> Callable[..., None]:
    """The fastest form for a tensor. Compilers are imported only where they are needed."""
    if values.dtype == torch.float32 and values.is_cuda:
        from quantease.kernels import cuda

        return cuda.run_block
    if values.dtype == torch.float32 and values.device.type == "cpu":
        from quantease.kernels import cpu

        return cpu.run_block
    return plain.run_block

# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The pass over a column block on a GPU, in Triton.

Layout. `values` and `work` are (block, out) with rows of the layer next to each other, so the 32 threads of a warp read
and write 32 neighboring numbers in one access. `coupling` is (block, block), and a number of it is the same for all rows.

A program is one warp with ROWS = 32 rows of the layer, one per thread, and all columns of the block. Rows are independent,
so programs never wait for each other. Columns are a chain: column j + 1 needs the change of column j. One thread per row
keeps this chain within a thread, without any synchronization per column.

Strips. The block is cut into strips of STRIP = 16 columns. A thread holds the 16 numbers of `work` of its row in
registers, in a tuple with one entry per column: registers have no addresses, so all loops over a strip are unrolled
(tl.static_range) and index the tuple with constants. A column is then about a dozen arithmetic operations and the update of
the at most 15 columns after it in the strip.

Left-looking. The changes of a strip also concern all later strips. They are not pushed to these at once (right-looking),
which would read and write the whole rest of the block once per strip. Instead each strip collects, when its turn comes,
what all earlier strips did to it: a sum of small matrix products (16 x 16) (16 x 32) in registers, after which the strip
is written once.

The arithmetic is that of `plain` but for the order of the sums: divisions are exact, and roundings go to even.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from quantease.kernels import Columns

# Columns of one launch. The collecting of earlier strips grows with the square of it and runs on one warp, so between
# launches the changes are applied to the rest of the block by one product of the matrix library.
BLOCK = 256
ROWS = 32  # of a program: one per thread of a warp
STRIP = (
    16  # columns; the least that tl.dot takes. With 32 registers do not suffice, and compiling takes ten times as long
)
WARPS = 1  # with more, the chain of columns would have to be synchronized between warps


def run_block(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: "Columns | None",
    curvature: Tensor | None,
    limit: Tensor | None,
) -> None:
    """See `quantease.kernels.run_block`."""
    # A block of a Hessian has one row on each page of memory; a copy of it is small and stays in the cache.
    coupling = coupling.contiguous()
    for start in range(0, len(values), BLOCK):
        here, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        _launch(
            values[here],
            work[here],
            coupling[here, here],
            None if columns is None else columns[here],
            None if curvature is None else curvature[here],
            None if limit is None else limit[here],
        )
        if len(work[later]):
            work[later].addmm_(coupling[here, later].T, work[here], alpha=-1)


def _launch(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: "Columns | None",
    curvature: Tensor | None,
    limit: Tensor | None,
) -> None:
    block, rows = values.shape
    unread = values  # passed for what is absent; the constants below keep the kernel from reading it
    _run[(triton.cdiv(rows, ROWS),)](
        values,
        work,
        coupling,
        unread if columns is None else columns.scale,
        unread if columns is None else columns.zero,
        unread if columns is None else columns.group,
        unread if columns is None or columns.levels is None else columns.levels,
        unread if columns is None or columns.thresholds is None else columns.thresholds,
        unread if curvature is None else curvature,
        unread if limit is None else limit,
        block,
        rows,
        values.stride(0),
        work.stride(0),
        coupling.stride(0),
        0 if columns is None else columns.scale.stride(0),
        0.0 if columns is None else float(columns.max_code),
        rounds=columns is not None,
        per_channel=columns is None or len(columns.scale) == 1,
        thresholds=0 if columns is None or columns.thresholds is None else len(columns.thresholds),
        descends=curvature is not None,
        keeps=limit is not None,
        ROWS=ROWS,
        STRIP=STRIP,
        num_warps=WARPS,
    )


@triton.jit
def _round_to_even(x):
    """The nearest whole number, ties to even; right below 2^22.

    1.5 * 2^23 plus x has no bits left for a fraction, and the addition rounds to even. Triton has no such rounding itself.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _nearest_level(scaled, levels_ptr, thresholds_ptr, thresholds: tl.constexpr):
    """The level above the last threshold that `scaled` exceeds, the lowest one where it exceeds none."""
    level = tl.zeros_like(scaled) + tl.load(levels_ptr)
    for code in range(thresholds):
        level = tl.where(scaled > tl.load(thresholds_ptr + code), tl.load(levels_ptr + code + 1), level)
    return level


@triton.jit
def _collect_earlier_strips(
    work_ptr,
    coupling_ptr,
    work_stride,
    coupling_stride,
    column,
    row,
    start,
    block,
    rows,
    ROWS: tl.constexpr,  # noqa: N803
    STRIP: tl.constexpr,  # noqa: N803
):
    """What the changes of all columns before `start` subtract from the strip, (STRIP, ROWS).

    `work` holds the changes of the columns that are done. The sum over them runs a strip at a time, in registers.
    """
    total = tl.zeros((STRIP, ROWS), dtype=tl.float32)
    for before in range(0, start, STRIP):
        earlier = before + tl.arange(0, STRIP)
        change = tl.load(
            work_ptr + earlier[:, None] * work_stride + row[None, :], mask=(row < rows)[None, :], other=0.0
        )
        coupling = tl.load(
            coupling_ptr + earlier[None, :] * coupling_stride + column[:, None],
            mask=(column < block)[:, None],
            other=0.0,
        )
        # Three TF32 products per float32 one, nearly float32 again. One would keep 10 bits of each factor: too few, as
        # coordinate descent adds small changes to large numbers.
        total = tl.dot(coupling, change, total, input_precision="tf32x3")
    return total


# Without this Triton compiles another variant for sizes that are 1 or divisible by 16: seconds each, and several layers.
SIZES = ["block", "rows", "values_stride", "work_stride", "coupling_stride", "grid_stride"]


# Constants (tl.constexpr), of which each combination is compiled once: `rounds`, whether there is a grid; `per_channel`,
# whether a row has one scale, which then stays in a register; `thresholds`, how many there are between levels, 0 where
# codes are whole numbers; `descends`, coordinate descent (True) or error feedback;
# `keeps`, whether weights beyond a limit stay unrounded; ROWS and STRIP, as tuples and tiles need constant sizes.
@triton.jit(do_not_specialize=SIZES)
def _run(
    values_ptr,
    work_ptr,
    coupling_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
    levels_ptr,
    thresholds_ptr,
    curvature_ptr,
    limit_ptr,
    block,
    rows,
    values_stride,
    work_stride,
    coupling_stride,
    grid_stride,
    max_code,
    rounds: tl.constexpr,
    per_channel: tl.constexpr,
    thresholds: tl.constexpr,
    descends: tl.constexpr,
    keeps: tl.constexpr,
    ROWS: tl.constexpr,  # noqa: N803
    STRIP: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows  # the last program may have threads without a row; they compute on the `other` of loads
    if rounds and per_channel:
        scale = tl.load(scale_ptr + row, mask=alive, other=1.0)
        zero = tl.load(zero_ptr + row, mask=alive, other=0.0)
    for start in range(0, block, STRIP):
        if start > 0:
            column = start + tl.arange(0, STRIP)
            inside = (column < block)[:, None] & alive[None, :]
            tile = work_ptr + column[:, None] * work_stride + row[None, :]
            collected = _collect_earlier_strips(
                work_ptr,
                coupling_ptr,
                work_stride,
                coupling_stride,
                column,
                row,
                start,
                block,
                rows,
                ROWS,
                STRIP,
            )
            tl.store(tile, tl.load(tile, mask=inside, other=0.0) - collected, mask=inside)
            # The tile was written in the layout of a matrix product and is read below row by row: other threads' writes.
            tl.debug_barrier()
        work = ()
        for k in tl.static_range(STRIP):
            inside = row < tl.where(start + k < block, rows, 0)
            work += (tl.load(work_ptr + (start + k) * work_stride + row, mask=inside, other=0.0),)
        for j in tl.static_range(STRIP):
            here = start + j
            inside = row < tl.where(here < block, rows, 0)  # no thread is, beyond the last column
            place = values_ptr + here * values_stride + row
            target = work[j]
            old = target
            if descends:
                old = tl.load(place, mask=inside, other=0.0)
                # div_rn: the exact quotient; the fast one is off by a bit, which would decide ties otherwise.
                target = old + tl.div_rn(target, tl.load(curvature_ptr + here, mask=here < block, other=1.0))
            new = target
            if rounds:
                if not per_channel:
                    group = tl.load(group_ptr + here, mask=here < block, other=0) * grid_stride + row
                    scale = tl.load(scale_ptr + group, mask=alive, other=1.0)
                    zero = tl.load(zero_ptr + group, mask=alive, other=0.0)
                if thresholds > 0:
                    new = _nearest_level(tl.div_rn(target, scale), levels_ptr, thresholds_ptr, thresholds) * scale
                else:
                    lowest = tl.floor(zero)
                    fraction = zero - lowest
                    code = tl.div_rn(target, scale) + fraction
                    # Cut to where the rounding is right. Codes are further in: |zero| is at most 6e4 (quantease/refit.py).
                    code = _round_to_even(tl.minimum(tl.maximum(code, -100000.0), 100000.0))
                    code = tl.minimum(tl.maximum(code, -lowest), max_code - lowest)
                    new = (code - fraction) * scale
            if keeps:
                error = target - new
                new = tl.where(error * error > tl.load(limit_ptr + here, mask=here < block, other=0.0), target, new)
            change = new - old
            tl.store(place, new, mask=inside)
            tl.store(work_ptr + here * work_stride + row, change, mask=inside)
            later = ()  # a tuple cannot be changed in place: a new one, with the columns after j updated
            for k in tl.static_range(STRIP):
                if k > j:
                    push = coupling_ptr + here * coupling_stride + start + k
                    later += (work[k] - tl.load(push, mask=start + k < block, other=0.0) * change,)
                else:
                    later += (work[k],)
            work = later
        tl.debug_barrier()  # the next strips read these changes

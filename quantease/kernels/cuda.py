# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
"""The pass over a block on a GPU, in Triton: one launch, each program with a few rows and all columns of the block.

A thread has a row. A block is cut into strips of columns whose values it holds in registers, one variable each (the
loops over a strip are unrolled), so that a step is a dozen operations and nothing waits for memory. What the strips
before push on to a strip is one small matrix product.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from quantease.kernels import Columns

BLOCK = 256  # columns of a launch; what they push on to the rest of the block is left to the matrix library
ROWS = 32  # of a program
STRIP = 16  # columns: with 32 the registers do not suffice, and compiling takes ten times as long
WARPS = 1


def run_block(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: "Columns | None",
    curvature: Tensor | None,
    limit: Tensor | None,
) -> None:
    """See `quantease.kernels.run_block`."""
    coupling = coupling.contiguous()  # small, and then near: rows of a whole Hessian lie on as many pages
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
    unread = values  # stands for what is absent
    _run[(triton.cdiv(rows, ROWS),)](
        values,
        work,
        coupling,
        unread if columns is None else columns.scale,
        unread if columns is None else columns.zero,
        unread if columns is None else columns.group,
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
        descends=curvature is not None,
        keeps=limit is not None,
        ROWS=ROWS,
        STRIP=STRIP,
        num_warps=WARPS,
    )


@triton.jit
def _round_to_even(x):
    """Adding and subtracting 1.5 * 2^23 leaves no room for a fraction; right below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _pushed_on(
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
    """What the columns of the block before `start` push on to the strip, (STRIP, ROWS)."""
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
        total = tl.dot(coupling, change, total, input_precision="tf32x3")
    return total


SIZES = ["block", "rows", "values_stride", "work_stride", "coupling_stride", "grid_stride"]


@triton.jit(do_not_specialize=SIZES)  # one compilation for all sizes
def _run(
    values_ptr,
    work_ptr,
    coupling_ptr,
    scale_ptr,
    zero_ptr,
    group_ptr,
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
    descends: tl.constexpr,
    keeps: tl.constexpr,
    ROWS: tl.constexpr,  # noqa: N803
    STRIP: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    if rounds and per_channel:
        scale = tl.load(scale_ptr + row, mask=alive, other=1.0)
        zero = tl.load(zero_ptr + row, mask=alive, other=0.0)
    for start in range(0, block, STRIP):
        if start > 0:
            column = start + tl.arange(0, STRIP)
            inside = (column < block)[:, None] & alive[None, :]
            tile = work_ptr + column[:, None] * work_stride + row[None, :]
            pushed = _pushed_on(
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
            tl.store(tile, tl.load(tile, mask=inside, other=0.0) - pushed, mask=inside)
            tl.debug_barrier()
        work = ()
        for k in tl.static_range(STRIP):
            inside = row < tl.where(start + k < block, rows, 0)
            work += (tl.load(work_ptr + (start + k) * work_stride + row, mask=inside, other=0.0),)
        for j in tl.static_range(STRIP):
            here = start + j
            inside = row < tl.where(here < block, rows, 0)
            place = values_ptr + here * values_stride + row
            target = work[j]
            old = target
            if descends:
                old = tl.load(place, mask=inside, other=0.0)
                target = old + tl.div_rn(target, tl.load(curvature_ptr + here, mask=here < block, other=1.0))
            new = target
            if rounds:
                if not per_channel:
                    group = tl.load(group_ptr + here, mask=here < block, other=0) * grid_stride + row
                    scale = tl.load(scale_ptr + group, mask=alive, other=1.0)
                    zero = tl.load(zero_ptr + group, mask=alive, other=0.0)
                lowest = tl.floor(zero)
                fraction = zero - lowest
                code = tl.div_rn(target, scale) + fraction
                code = _round_to_even(tl.minimum(tl.maximum(code, -100000.0), 100000.0))
                code = tl.minimum(tl.maximum(code, -lowest), max_code - lowest)
                new = (code - fraction) * scale
            if keeps:
                error = target - new
                new = tl.where(error * error > tl.load(limit_ptr + here, mask=here < block, other=0.0), target, new)
            change = new - old
            tl.store(place, new, mask=inside)
            tl.store(work_ptr + here * work_stride + row, change, mask=inside)
            later = ()
            for k in tl.static_range(STRIP):
                if k > j:
                    push = coupling_ptr + here * coupling_stride + start + k
                    later += (work[k] - tl.load(push, mask=start + k < block, other=0.0) * change,)
                else:
                    later += (work[k],)
            work = later
        tl.debug_barrier()  # the next strips read these changes

# pyright: basic, reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
"""The pass over a block on a GPU, in Triton: one launch, each program with a few rows and all columns of the block.

A block is cut into strips of 32 columns, one a lane of a warp. What the strips before push on to a strip is one small
matrix product; within the strip the lanes hold their columns' work in registers, so a step is a shuffle, the rounding
and one multiplication and addition.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from quantease.kernels import Columns

ROWS = 16  # of a program: the least that the tensor cores take
STRIP = 32
WARPS = 4


def run_block(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: "Columns | None",
    curvature: Tensor | None,
    limit: Tensor | None,
) -> None:
    """See `quantease.kernels.run_block`."""
    block, rows = values.shape
    coupling = coupling if coupling.stride(1) == 1 else coupling.contiguous()  # a factor may be stored by columns
    scale = values if columns is None else columns.scale  # a pointer that is not read
    _run[(triton.cdiv(rows, ROWS),)](
        values,
        work,
        coupling,
        scale,
        values if columns is None else columns.zero,
        values if columns is None else columns.group,
        values if curvature is None else curvature,
        values if limit is None else limit,
        block,
        rows,
        values.stride(0),
        work.stride(0),
        coupling.stride(0),
        scale.stride(0),
        0.0 if columns is None else float(columns.max_code),
        rounds=columns is not None,
        descends=curvature is not None,
        keeps=limit is not None,
        precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        ROWS=ROWS,
        STRIP=STRIP,
        num_warps=WARPS,
    )


@triton.jit
def _round_to_even(x):
    """Adding and subtracting 1.5 * 2^23 leaves no room for a fraction; right below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
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
    descends: tl.constexpr,
    keeps: tl.constexpr,
    precision: tl.constexpr,
    ROWS: tl.constexpr,  # noqa: N803
    STRIP: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < rows
    lane = tl.arange(0, STRIP)
    for start in range(0, block, STRIP):
        column = start + lane
        inside = alive[:, None] & (column < block)[None, :]
        work_tile = work_ptr + column[None, :] * work_stride + row[:, None]
        values_tile = values_ptr + column[None, :] * values_stride + row[:, None]
        work = tl.load(work_tile, mask=inside, other=0.0)
        for before in range(0, start, STRIP):  # what the strips before push on to this one
            earlier = before + lane
            change = tl.load(work_ptr + earlier[None, :] * work_stride + row[:, None], mask=alive[:, None], other=0.0)
            pushed = tl.load(
                coupling_ptr + earlier[:, None] * coupling_stride + column[None, :],
                mask=(column < block)[None, :],
                other=0.0,
            )
            work -= tl.dot(change, pushed, input_precision=precision)
        values = tl.load(values_tile, mask=inside, other=0.0)
        changes = tl.zeros((ROWS, STRIP), dtype=tl.float32)
        for j in range(0, tl.minimum(STRIP, block - start)):
            mine = (lane == j)[None, :]
            target = tl.sum(tl.where(mine, work, 0.0), axis=1)
            old = target
            if descends:
                old = tl.sum(tl.where(mine, values, 0.0), axis=1)
                target = old + tl.div_rn(target, tl.load(curvature_ptr + start + j))
            new = target
            if rounds:
                place = tl.load(group_ptr + start + j) * grid_stride + row
                scale = tl.load(scale_ptr + place, mask=alive, other=1.0)
                zero = tl.load(zero_ptr + place, mask=alive, other=0.0)
                lowest = tl.floor(zero)
                fraction = zero - lowest
                code = tl.div_rn(target, scale) + fraction
                code = _round_to_even(tl.minimum(tl.maximum(code, -100000.0), 100000.0))
                code = tl.minimum(tl.maximum(code, -lowest), max_code - lowest)
                new = (code - fraction) * scale
            if keeps:
                error = target - new
                new = tl.where(error * error > tl.load(limit_ptr + start + j), target, new)
            change = new - old
            couplings = tl.load(
                coupling_ptr + (start + j) * coupling_stride + column,
                mask=(column < block) & (lane > j),
                other=0.0,
            )
            work -= change[:, None] * couplings[None, :]
            values = tl.where(mine, new[:, None], values)
            changes = tl.where(mine, change[:, None], changes)
        tl.store(values_tile, values, mask=inside)
        tl.store(work_tile, changes, mask=inside)
        tl.debug_barrier()  # the next strips read these changes

"""The pass over a column block on the CPU, compiled by numba: a few rows at a time, which stay in the first-level cache.

The innermost loops run over rows, which are contiguous, so that the compiler makes vector instructions of them. They are
separate loops over short arrays and not one long loop, as each of them is then simple enough to be vectorized. Threads
share nothing: each has rows of its own.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from quantease.kernels import Columns

log = logging.getLogger(__name__)

ROWS = 64  # taken together, at most: with 64 columns, values and work are 16 KiB each, of a cache of 32 KiB or more
VECTOR = 16  # float32 in a 64-byte cache line and in the widest vector register: no two threads write to one line
# An empty array stands for None: with optional arguments numba would compile another variant for each combination.
NONE = np.empty(0, np.float32)
NO_GRID = np.empty((0, 0), np.float32)
NO_GROUP = np.empty(0, np.int32)


def run_block(
    values: Tensor,
    work: Tensor,
    coupling: Tensor,
    columns: "Columns | None",
    curvature: Tensor | None,
    limit: Tensor | None,
) -> None:
    """See `quantease.kernels.run_block`."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # pyright: ignore
    numba.set_num_threads(threads)
    _run(
        values.numpy(),
        work.numpy(),
        coupling.numpy(),
        *((NO_GRID, NO_GRID, NO_GROUP, 0, NONE, NONE) if columns is None else _arrays(columns)),
        NONE if curvature is None else curvature.numpy(),
        NONE if limit is None else limit.numpy(),
        threads,
    )


def _arrays(columns: "Columns") -> tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray, np.ndarray]:
    levels, thresholds = (NONE if table is None else table.numpy() for table in (columns.levels, columns.thresholds))
    return columns.scale.numpy(), columns.zero.numpy(), columns.group.numpy(), columns.max_code, levels, thresholds


def _compiled(**options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a function to be compiled when it is first called, and its code to be kept on disk between processes.

    error_model: division by zero gives infinity, as in torch, and not an exception, whose check would also keep loops from
    being vectorized. Not fastmath: it would reorder sums.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        try:
            return numba.njit(cache=True, error_model="numpy", **options)(function)
        except RuntimeError as error:  # neither the folder of this file nor the user's cache folder can be written
            log.debug("%s is compiled anew in every process: %s", function.__name__, error)
            return numba.njit(error_model="numpy", **options)(function)

    return decorate


@_compiled(parallel=True)
def _run(values, work, coupling, scale, zero, group, max_code, levels, thresholds, curvature, limit, threads):
    rows = values.shape[1]
    parts = (rows + ROWS * threads - 1) // (ROWS * threads) * threads  # equally many parts for each thread
    size = ((rows + parts - 1) // parts + VECTOR - 1) // VECTOR * VECTOR  # rows of a part, in whole vectors
    for part in numba.prange((rows + size - 1) // size):
        first = part * size
        count = min(size, rows - first)
        _run_rows(
            values, work, coupling, scale, zero, group, max_code, levels, thresholds, curvature, limit, first, count
        )


@_compiled()
def _look_up(target, scale, levels, thresholds, change, count):
    """The nearest level times the scale: see plain.nearest_level_codes. A comparison and a choice for each threshold."""
    scaled = np.empty(ROWS, np.float32)
    for r in range(count):
        scaled[r] = target[r] / scale[r]
        change[r] = levels[0]
    for code in range(len(thresholds)):
        threshold, level = thresholds[code], levels[code + 1]
        for r in range(count):
            change[r] = level if scaled[r] > threshold else change[r]
    for r in range(count):
        change[r] *= scale[r]


@_compiled()
def _run_rows(values, work, coupling, scale, zero, group, max_code, levels, thresholds, curvature, limit, first, count):
    descends, keeps, looks_up = len(curvature) > 0, len(limit) > 0, len(levels) > 0
    rounds = len(group) > 0 and not looks_up
    block, last = values.shape[0], first + count
    target, change = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for j in range(block):
        mine, old = work[j, first:last], values[j, first:last]
        if descends:
            for r in range(count):
                target[r] = old[r] + mine[r] / curvature[j]
        else:
            for r in range(count):
                target[r] = mine[r]
                old[r] = mine[r]
        for r in range(count):
            change[r] = target[r]
        if rounds:
            s, z = scale[group[j], first:last], zero[group[j], first:last]
            for r in range(count):
                lowest = np.floor(z[r])  # see plain._nearest; np.rint rounds to even, as torch.round does
                fraction = z[r] - lowest
                code = np.rint(target[r] / s[r] + fraction)
                code = min(max(code, -lowest), np.float32(max_code) - lowest)
                change[r] = (code - fraction) * s[r]
        if looks_up:
            _look_up(target, scale[group[j], first:last], levels, thresholds, change, count)
        if keeps:
            for r in range(count):
                error = target[r] - change[r]
                if error * error > limit[j]:
                    change[r] = target[r]
        for r in range(count):
            new = change[r]
            change[r] = new - old[r]  # in feedback, old was set to the unrounded value above
            old[r] = new
            mine[r] = change[r]
        for k in range(j + 1, block):
            later, factor = work[k, first:last], coupling[j, k]
            for r in range(count):
                later[r] -= factor * change[r]

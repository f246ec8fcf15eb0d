"""GPTQ (Frantar et al., 2023, https://arxiv.org/abs/2210.17323), Algorithm 1.

Columns are rounded in order; the columns that remain compensate for the error of each, by the rows of the upper Cholesky
factor U of the inverse Hessian, H^-1 = U^T U (quantease/cholesky.py):

    q_j = round(w_j),    w_k <- w_k - (w_j - q_j) U_jk / U_jj    for k > j.

The kernel computes w_k <- w_k - coupling_jk (q_j - w_j), hence coupling = -U_jk / U_jj.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from quantease.cholesky import damping_notes, inverse_factor
from quantease.grid import Grid, GridSpec
from quantease.kernels import Columns, run_block
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale

BLOCK = 128  # columns whose compensation of later ones is one matrix product, as in the authors' code


@dataclass(frozen=True)
class GPTQ(LayerSolver):
    """Algorithm 1. Act-order is the run's `act_order`, which is the same for every method.

    Attributes:
        damping: fraction of the mean Hessian diagonal that is added to the diagonal. Where the factorization fails it
            is raised tenfold until it succeeds, and the answer says so.
        block_size: columns whose compensation of later columns is gathered into one matrix product; changes the speed,
            not the result.
        static_groups: fit the grids of all groups to the original weights. Otherwise a group's grid is fitted when its
            first column is reached, to the weights as they have been compensated by then. The authors' code gathers the
            compensation of 128 columns, so a group that begins inside such a block is fitted to weights that lack the
            compensation of the block; here they are fully compensated. Layer errors differ by at most 4 %.
    """

    damping: float = 0.01
    block_size: int = BLOCK
    static_groups: bool = False

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    @property
    def rows_independent(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        factor, damping = inverse_factor(problem, self.damping)
        weight = problem.weight.T.clone(memory_format=torch.contiguous_format)  # (in, out), compensated as it goes
        refit = None if self.static_groups else grid
        values = feed_back(weight, coupling_of(factor), grid.columns(), self.block_size, refit)
        return answer_on(grid, values, self.damping, damping)


def coupling_of(factor: Tensor) -> Tensor:
    """-U_jk / U_jj (in, in) for the factor U; in place, as it is the largest matrix of a wide layer."""
    return factor.div_(-factor.diagonal()[:, None])


def feed_back(
    weight: Tensor, coupling: Tensor, columns: Columns, block_size: int = BLOCK, refit: Grid | None = None
) -> Tensor:
    """The rounded values (in, out): GPTQ's pass over all columns, each compensated by those after it.

    Args:
        weight: (in, out); used up.
        coupling: (in, in), of which the part above the diagonal is read.
        columns: the grid to round to.
        block_size: columns between two matrix products.
        refit: the grid that `columns` are of, if its groups are to be fitted anew, in place, to their compensated weights.
    """
    values = torch.empty_like(weight)
    # A per-channel grid is always that of the original weights: its group is reached before anything is compensated.
    first = {} if refit is None or refit.groups == 1 else first_columns(refit.group)
    for start, stop in column_blocks(len(weight), block_size, first):
        here, later = slice(start, stop), slice(stop, None)
        if refit is not None and start in first:
            refit.fit_group_(first[start], weight[refit.group == first[start]].T, columns)
        run_block(values[here], weight[here], coupling[here, here], columns[here])
        # weight[here] now holds the changes of the block; all later columns get their compensation in one product.
        weight[later].addmm_(coupling[here, later].T, weight[here], alpha=-1)
    return values


def answer_on(grid: Grid, values: Tensor, asked: float, damping: float) -> QuantizedLayer:
    """The answer whose weights are `values` (in, out), which are on the grid.

    Args:
        asked: the damping of the method's settings.
        damping: what the factorization took.
    """
    notes = damping_notes(asked, damping)
    # Encoding only reads the codes off.
    return QuantizedLayer(grid.encode(values.T), grid, damping=damping, damping_raised=bool(notes), notes=notes)


def column_blocks(columns: int, block_size: int, first: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Column blocks (start, stop) of at most `block_size` columns, cut where the grid of a group must be fitted.

    In act-order the groups' first columns may be anywhere, so the blocks can be short.
    """
    return pairwise(sorted({*range(0, columns, block_size), *first, columns}))


def first_columns(group: Tensor) -> dict[int, int]:
    """{column: group} for the first column of each group, in whatever order the columns are."""
    places: dict[int, int] = {}
    for column, number in enumerate(group.tolist()):
        places.setdefault(number, column)
    return {column: number for number, column in places.items()}

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
from quantease.grid import GridSpec
from quantease.kernels import run_block
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


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
    block_size: int = 128
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
        coupling = factor.div_(-factor.diagonal()[:, None])  # in place: the largest matrix of a wide layer
        weight = problem.weight.T.clone(memory_format=torch.contiguous_format)  # (in, out), compensated as it goes
        values = torch.empty_like(weight)
        columns = grid.columns()
        # A per-channel grid is always that of the original weights: its group is reached before anything is compensated.
        first = {} if self.static_groups or grid.groups == 1 else _first_columns(grid.group)
        for start, stop in self._blocks(len(weight), first):
            here, later = slice(start, stop), slice(stop, None)
            if start in first:
                group = first[start]
                grid.fit_group_(group, weight[grid.group == group].T, columns)
            run_block(values[here], weight[here], coupling[here, here], columns[here])
            # weight[here] now holds the changes of the block; all later columns get their compensation in one product.
            weight[later].addmm_(coupling[here, later].T, weight[here], alpha=-1)
        notes = damping_notes(self.damping, damping)
        # The values are on the grid, so encoding only reads their codes off.
        return QuantizedLayer(grid.encode(values.T), grid, damping=damping, damping_raised=bool(notes), notes=notes)

    def _blocks(self, columns: int, first: dict[int, int]) -> Iterator[tuple[int, int]]:
        """Column blocks (start, stop) of at most `block_size` columns, cut where the grid of a group must be fitted.

        In act-order the groups' first columns may be anywhere, so the blocks can be short.
        """
        return pairwise(sorted({*range(0, columns, self.block_size), *first, columns}))


def _first_columns(group: Tensor) -> dict[int, int]:
    """{column: group} for the first column of each group, in whatever order the columns are."""
    places: dict[int, int] = {}
    for column, number in enumerate(group.tolist()):
        places.setdefault(number, column)
    return {column: number for number, column in places.items()}

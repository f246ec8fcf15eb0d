"""GPTQ (Frantar et al., 2023, https://arxiv.org/abs/2210.17323), Algorithm 1, on a grid that is fitted once.

Columns are rounded in order; the error of each is made up for by the columns still to come, with the rows of the upper
Cholesky factor of the inverse Hessian as the weights of that compensation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantease.grid import Grid, GridSpec
from quantease.layer import LayerProblem, QuantizedLayer, Unsupported, revive_dead_columns

LARGEST_DAMPING = 100.0  # times the mean diagonal: nothing is left of the Hessian long before that


@dataclass(frozen=True)
class GPTQ:
    """Algorithm 1. Act-order is the run's `act_order`, which is the same for every method.

    Attributes:
        damping: fraction of the mean Hessian diagonal that is added to the diagonal. Where the factorization fails it
            is raised tenfold until it succeeds, and the answer says so.
        block_size: columns whose compensation of later columns is gathered into one matrix product; changes the speed,
            not the result.
    """

    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, not {self.damping}")
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {self.block_size}")

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        factor, damping = self._inverse_factor(problem.hessian)
        weight = problem.weight.T.clone(memory_format=torch.contiguous_format)  # (in, out)
        for start in range(0, len(weight), self.block_size):
            stop = min(start + self.block_size, len(weight))
            errors = _round_block(weight[start:stop], factor[start:stop, start:stop], grid, start)
            weight[stop:] -= factor[start:stop, stop:].T @ errors
        notes = () if damping == self.damping else (f"damping raised from {self.damping:g} to {damping:g}",)
        return QuantizedLayer(grid.encode(weight.T), grid, damping=damping, notes=notes)

    def _inverse_factor(self, hessian: Tensor) -> tuple[Tensor, float]:
        """The upper Cholesky factor of the inverse of the damped Hessian, and the damping that it took."""
        hessian = revive_dead_columns(hessian)
        mean, diagonal = hessian.diagonal().mean(), hessian.diagonal().clone()
        damping = self.damping
        while damping <= LARGEST_DAMPING:
            hessian.diagonal().copy_(diagonal + damping * mean)
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and torch.isfinite(upper).all():
                    return upper, damping
            damping = max(10 * damping, 1e-4)
        raise Unsupported(f"the Hessian cannot be factorized, even with damping {LARGEST_DAMPING:g}: is it finite?")


def _round_block(weight: Tensor, factor: Tensor, grid: Grid, start: int) -> Tensor:
    """Round the columns of one block (block, out) in place; returns their errors over the factor's diagonal."""
    columns = grid.columns(start, start + len(weight))
    errors = torch.empty_like(weight)
    for j, pivot in enumerate(factor.diagonal().tolist()):
        rounded = columns.round_(weight[j].clone(), j)
        errors[j] = (weight[j] - rounded) / pivot
        weight[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        weight[j] = rounded
    return errors

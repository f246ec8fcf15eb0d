"""Outlier-aware QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885), Algorithm 3.

W is approximated by W_hat + S, W_hat on a grid that is fitted without the outliers and S sparse. Sweeps of coordinate
descent over W_hat, with W - S as the target, alternate with projected gradient steps on S,

    S <- top(S + (W - W_hat - S) H / lambda_max(H)),

where top keeps the s largest entries (unstructured) or the input columns of largest norm (structured).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantease.coordinate_descent import Schedule
from quantease.grid import Grid, GridSpec, storable
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.sparse import Outliers
from quantease.sweeps import Convergence, Residual, hessian_with_positive_diagonal, sweep

SMALLEST = 1e-30  # an eigenvalue, where all inputs are always zero
POWER_ITERATIONS = 64  # for the largest eigenvalue: from below, within 8 % at 20,000 columns whatever the spectrum
SAFETY = 1.1  # which this makes up for


@dataclass(frozen=True)
class OutlierQuantEase(LayerSolver):
    """Algorithm 3.

    Attributes:
        outlier_ratio: the share of the weights (or, if structured, of the input columns) that is kept in 16 bits.
        structured: keep whole input columns.
        num_iters: pairs of a sweep and a gradient step.
        relax_every: relax one sweep in so many, as in Algorithm 2; None: round in every sweep.
        track_objective: record the relative error after every pair, at the cost of another matrix product each.
    """

    outlier_ratio: float = 0.01
    structured: bool = False
    num_iters: int = 30
    relax_every: int | None = 3
    track_objective: bool = False

    def __post_init__(self) -> None:
        Schedule(self.num_iters, self.relax_every)
        if not 0 <= self.outlier_ratio <= 1:
            raise ValueError(f"outlier_ratio must lie in 0 to 1, not {self.outlier_ratio}")

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        hessian = hessian_with_positive_diagonal(problem)
        weight = problem.weight.T  # everything below is (in, out)
        sparse = weight * self._keep(self._first_sizes(weight, problem.hessian))
        target = weight - sparse
        grid = problem.fit_grid(spec, target.T)
        w_hat = target.clone(memory_format=torch.contiguous_format)
        residual = Residual(target, w_hat)  # W - W_hat - S
        step = 1 / (SAFETY * largest_eigenvalue(problem.hessian))

        history = []
        schedule, convergence = Schedule(self.num_iters, self.relax_every), Convergence(w_hat.device)
        for iteration in range(self.num_iters):
            watched = not self._count(weight) and schedule.only_rounds_after(iteration)
            rounds = schedule.rounds(iteration)
            sweep(w_hat, target, residual, hessian, grid if rounds else None, convergence if watched else None)
            if watched and convergence.reached():
                break
            if self._count(weight):
                sparse = residual.hessian_product(problem.hessian).mul_(step).add_(sparse)
                sparse *= self._keep(sparse.abs())
                target = weight - sparse
                residual.update(target, w_hat)
            if self.track_objective:
                history.append(problem.relative_error((w_hat + sparse).T))
        return self._answer(w_hat, sparse, grid, tuple(history))

    def _first_sizes(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """By what the first outliers are chosen (in, out); inputs that are always zero come last.

        Single weights by their size, as in the paper: those that stretch the grid. Columns by their part of the output,
        which gave lower errors than their norm on every problem of the tests.
        """
        size = hessian.diagonal()[:, None]
        return weight.abs() * (size.sqrt() if self.structured else (size > 0) + 1e-9)

    def _count(self, weight: Tensor) -> int:
        """How many weights, or columns, are kept."""
        return round(self.outlier_ratio * (len(weight) if self.structured else weight.numel()))

    def _keep(self, size: Tensor) -> Tensor:
        """The mask (in, out) of the entries or columns to keep, given the size of every entry."""
        score = size.square().sum(1) if self.structured else size.flatten()
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask[score.topk(self._count(size)).indices] = True
        return mask[:, None].expand_as(size) if self.structured else mask.view_as(size)

    def _answer(self, w_hat: Tensor, sparse: Tensor, grid: Grid, history: tuple[float, ...]) -> QuantizedLayer:
        """An outlier's code becomes that of zero, and its value the whole weight, as it is stored."""
        kept = self._keep(sparse.abs()).T
        whole = (w_hat + sparse).T
        codes = grid.encode(torch.where(kept, 0.0, w_hat.T))
        rows, columns = kept.nonzero(as_tuple=True)
        if not len(rows):
            return QuantizedLayer(codes, grid, history=history)
        values = storable(whole[rows, columns], grid.spec.scale_bits)
        return QuantizedLayer(
            codes, grid, Outliers(rows, columns, values, self.structured, grid.spec.scale_bits), history=history
        )


def largest_eigenvalue(hessian: Tensor) -> Tensor:
    """The largest eigenvalue of a positive semidefinite matrix, by power iteration: a little too small."""
    vector = torch.randn(len(hessian), generator=torch.Generator().manual_seed(0)).to(hessian)
    for _ in range(POWER_ITERATIONS):
        vector = hessian @ (vector / vector.norm().clamp(min=SMALLEST))
    return vector.norm().clamp(min=SMALLEST)

"""Outlier-aware QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885), Algorithm 3.

W is approximated by W_hat + S, W_hat on a grid that is fitted without the outliers and S sparse. Sweeps of coordinate
descent over W_hat, with W - S as the target, alternate with projected gradient steps on S,

    S <- top(S + (W - W_hat - S) H / lambda_max(H)),

where top keeps the s largest entries (unstructured) or the input columns of largest norm (structured). This is iterative
hard thresholding: the gradient of the objective with respect to S is -2 (W - W_hat - S) H, its Lipschitz constant is
L = 2 lambda_max(H) (equation 20), and a step of 1 / L followed by the projection never raises the objective.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.conditioning import damp_rank_deficient
from quantease.coordinate_descent import Schedule
from quantease.grid import Grid, GridSpec
from quantease.grids.scale_formats import float_format
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale
from quantease.sparse import Outliers
from quantease.sweeps import Convergence, Residual, hessian_with_positive_diagonal, sweep

SMALLEST = 1e-30  # an eigenvalue, where all inputs are dead: what is divided by it is zero, and stays zero
# Power iteration finds the largest eigenvalue from below, after 64 products within 8 % at 20,000 columns whatever the
# spectrum. A step that is too long could raise the objective, one that is a little too short costs nothing.
POWER_ITERATIONS = 64
SAFETY = 1.1  # makes up for these 8 %
LAST = 1e-9  # weight of a dead input in the first choice: chosen after all others, and still by size among themselves


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

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        damped, damping, notes = damp_rank_deficient(problem.hessian)  # as in coordinate_descent.py
        hessian = hessian_with_positive_diagonal(damped)
        weight = problem.weight.T  # everything below is (in, out)
        sparse = weight * self._keep(self._first_sizes(weight, problem.hessian))  # S
        target = weight - sparse
        # Outliers are zero in the target, so they do not stretch the grid. It is fitted once, as in the paper: later
        # steps may choose other outliers, and these weights then have to do with this grid.
        grid = problem.fit_grid(spec, target.T)
        w_hat = target.clone(memory_format=torch.contiguous_format)
        residual = Residual(target, w_hat)  # W - W_hat - S
        step = 1 / (SAFETY * largest_eigenvalue(damped))  # the 2 of the gradient and that of L cancel

        history = []
        schedule, convergence = Schedule(self.num_iters, self.relax_every), Convergence(w_hat.device)
        for iteration in range(self.num_iters):
            # With outliers a gradient step moves the target after every sweep, so a sweep that changes nothing says
            # nothing about the next one.
            may_stop = not self._count(weight) and schedule.only_rounds_after(iteration)
            rounds = schedule.rounds(iteration)
            sweep(w_hat, target, residual, hessian, grid if rounds else None, convergence if may_stop else None)
            if may_stop and convergence.reached():
                break
            if self._count(weight):
                # Without the dead inputs' curvature: S gets no gradient from dead inputs.
                sparse = residual.hessian_product(damped).mul_(step).add_(sparse)
                sparse *= self._keep(sparse.abs())
                target = weight - sparse
                residual.update(target, w_hat)
            if self.track_objective:
                history.append(problem.relative_error((w_hat + sparse).T))
        answer = self._answer(w_hat, sparse, grid, tuple(history))
        return replace(answer, damping=damping, damping_raised=damping is not None, notes=notes)

    def _first_sizes(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The sizes (in, out) by which the first outliers are chosen; those of dead inputs come last.

        Single weights by their absolute value, as in the paper: those that stretch the grid. Columns by their part of
        the output, |w| sqrt(H_jj), which gave lower errors than their norm on every problem of the tests.
        """
        energy = hessian.diagonal()[:, None]  # (in, 1), the sum of x_j^2
        return weight.abs() * (energy.sqrt() if self.structured else (energy > 0) + LAST)

    def _count(self, weight: Tensor) -> int:
        """How many weights, or input columns, are kept, given a matrix of the weight's shape (in, out)."""
        return round(self.outlier_ratio * (len(weight) if self.structured else weight.numel()))

    def _keep(self, size: Tensor) -> Tensor:
        """The mask (in, out) of the entries or columns to keep, given the size of every entry."""
        # topk and not a threshold: ties must not change the number of outliers, which is what the bits are counted from.
        score = size.square().sum(1) if self.structured else size.flatten()
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask[score.topk(self._count(size)).indices] = True
        return mask[:, None].expand_as(size) if self.structured else mask.view_as(size)

    def _answer(self, w_hat: Tensor, sparse: Tensor, grid: Grid, history: tuple[float, ...]) -> QuantizedLayer:
        """The layer as it is stored: the code of an outlier becomes that of zero, its value the whole weight.

        The algorithm keeps W_hat + S at an outlier, with any W_hat. A code of zero there says the same and lets a
        structured layer drop the codes of whole columns.
        """
        kept = self._keep(sparse.abs()).T  # (out, in), from here on in the layout of a layer
        whole = (w_hat + sparse).T
        codes = grid.encode(torch.where(kept, 0.0, w_hat.T))
        rows, columns = kept.nonzero(as_tuple=True)
        if not len(rows):
            return QuantizedLayer(codes, grid, history=history)
        values = float_format(grid.spec.scale_bits).storable(whole[rows, columns])
        return QuantizedLayer(
            codes, grid, Outliers(rows, columns, values, self.structured, grid.spec.scale_bits), history=history
        )


def largest_eigenvalue(hessian: Tensor) -> Tensor:
    """The largest eigenvalue (a scalar) of a positive semidefinite matrix, by power iteration: a little too small."""
    # Random, as a fixed direction could be orthogonal to the leading eigenvector; seeded and drawn on the CPU, so that
    # answers repeat and do not depend on the device's generator.
    vector = torch.randn(len(hessian), generator=torch.Generator().manual_seed(0)).to(hessian)
    for _ in range(POWER_ITERATIONS):
        vector = hessian @ (vector / vector.norm().clamp(min=SMALLEST))
    return vector.norm().clamp(min=SMALLEST)

"""ADMM-Q (2026, https://arxiv.org/abs/2605.11222; an author of QuantEase is among its authors): the alternating direction
method of multipliers, then coordinate descent.

With inputs of unit size, H <- H / (n n^T) and W <- W n for n = sqrt(diag H), a copy B of the answer is free and another, D,
is on the grid; the multipliers V pull them together, the stronger the larger the penalty r:

    B = (W H - V + r D) (H + r I)^-1,    D = round(B + V / r),    V <- V + r (B - D).

One eigendecomposition H = E diag(l) E^T makes every penalty cheap: (H + r I)^-1 = E diag(1 / (l + r)) E^T. Every three
rounds r grows, by 1.3 if more than 10 % of D has changed in them, by 1.2 if more than 0.5 %, else by 1.1; once nothing has
changed, D stands. It is then polished by cyclic coordinate descent without relaxed sweeps.

The equations follow the paper's abstract and ALPS (https://arxiv.org/abs/2406.07831), by the same group, whose code prunes
in this way. Where this departs from it: each row has its own penalty and stops on its own, as the eigendecomposition
allows, so that rows are independent of each other; and, as all descents here, it is damped only where the rank of the
Hessian is low (quantease/conditioning.py).

The rounds are made in float64. A weight that is rounded the other way changes all later rounds, so in float32 the order of
the sums, and with it the device, would decide a quarter of the codes, at errors within 2 % of each other.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.conditioning import damp_rank_deficient
from quantease.coordinate_descent import QuantEase
from quantease.grid import Grid, GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from quantease.normal_scale import at_normal_scale
from quantease.sweeps import hessian_with_positive_diagonal

CHECK = 3  # rounds between two changes of the penalty
MANY, SOME = 0.1, 0.005  # shares of D that have changed
FAST, MEDIUM, SLOW = 1.3, 1.2, 1.1  # what the penalty grows by where many, some or any have


@dataclass(frozen=True)
class ADMMQ(LayerSolver):
    """ADMM over the grid, then coordinate descent.

    Attributes:
        rounds: of ADMM at most; fewer once every row stands.
        penalty: r of the first rounds.
        sweeps: of coordinate descent at most, from ADMM's answer; 0: none.
    """

    rounds: int = 300
    penalty: float = 0.1
    sweeps: int = 30

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.sweeps < 0:
            raise ValueError(f"rounds must be at least 1, sweeps not negative: {self.rounds}, {self.sweeps}")
        if self.penalty <= 0:
            raise ValueError(f"penalty must be positive, not {self.penalty}")

    @property
    def rows_independent(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        if self.sweeps:
            answer = QuantEase(self.sweeps, relax_every=None, init=replace(self, sweeps=0)).solve(problem, spec)
            return replace(answer, notes=tuple(dict.fromkeys(answer.notes)))  # both stages note a low rank
        grid = problem.fit_grid(spec)
        damped, damping, notes = damp_rank_deficient(problem.hessian)
        hessian = hessian_with_positive_diagonal(damped)
        values = self._alternate(problem.weight.double(), hessian.double(), grid)
        codes, nearest = grid.encode(values), grid.encode(problem.weight)
        codes = torch.where(problem.hessian.diagonal() > 0, codes, nearest)
        return QuantizedLayer(codes, grid, damping=damping, damping_raised=damping is not None, notes=notes)

    def _alternate(self, weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
        """D (out, in) in the units of the weight, after the last round; all in float64."""
        size = hessian.diagonal().sqrt()  # n (in,)
        spectrum = Spectrum.of(hessian / size / size[:, None])
        target = spectrum.rotated_product(weight * size)  # W H E
        rounded = grid.decode(grid.encode(weight)) * size  # D
        multipliers = self.penalty * (weight * size - rounded)  # V after a round from D = W: B is W then
        penalty = weight.new_full((len(weight), 1), self.penalty)
        standing = torch.zeros_like(penalty, dtype=torch.bool)
        before = rounded
        for number in range(1, self.rounds):
            free = spectrum.free_copy(target, multipliers, rounded, penalty)
            on_grid = grid.decode(grid.encode((free + multipliers / penalty) / size)) * size
            rounded = torch.where(standing, rounded, on_grid)
            multipliers += penalty * (free - rounded)
            if number % CHECK == 0:
                changed = (rounded != before).float().mean(1, keepdim=True)
                standing |= changed == 0
                if standing.all():
                    break
                penalty *= growth(changed)
                before = rounded
        return rounded / size


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The eigenvalues (in,) and eigenvectors (in, in) of a Hessian."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> "Spectrum":
        """Those of `hessian` (in, in).

        Raises:
            Unsupported: they cannot be found.
        """
        try:
            values, vectors = torch.linalg.eigh(hessian)
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise Unsupported(f"the Hessian has no eigendecomposition: is it finite? ({error})") from None
        return cls(values.clamp(min=0), vectors)  # it is a sum of squares: below zero are rounding errors

    def rotated_product(self, weight: Tensor) -> Tensor:
        """W H E (out, in)."""
        return (weight @ self.vectors).mul_(self.values)

    def free_copy(self, target: Tensor, multipliers: Tensor, rounded: Tensor, penalty: Tensor) -> Tensor:
        """B = (W H - V + r D) (H + r I)^-1 (out, in).

        Args:
            target: W H E.
            multipliers: V (out, in).
            rounded: D (out, in).
            penalty: r of each row (out, 1).
        """
        rotated = target + (penalty * rounded - multipliers) @ self.vectors
        return rotated.div_(self.values + penalty) @ self.vectors.T


def growth(changed: Tensor) -> Tensor:
    """What a penalty grows by where this share of D has changed."""
    fast_or_medium = torch.where(changed > MANY, FAST, MEDIUM)
    return torch.where(changed > SOME, fast_or_medium, torch.where(changed > 0, SLOW, 1.0))

"""MagR (Zhang et al., 2024, https://arxiv.org/abs/2406.00800): weights of smaller range with almost the same outputs.

Per row (or group of a row), proximal gradient descent on (w - w0) H (w - w0)^T / 2 + penalty max |w|:

    v = w - (w - w0) H / sigma_max(H),    w = v - penalty Proj(v / penalty),

with the projection on the l1 ball of radius 1, which is the proximal step of the maximum norm. The method then quantizes w:
its grid is finer, as its range is smaller. Nothing is stored for it. The penalties are those of the authors' code; there H
has the norm 1, so errors of outputs and penalty are weighed against each other whatever the scale of the inputs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.outliers import largest_eigenvalue


@dataclass(frozen=True)
class MagR:
    """Shrinks the range of the weights before a method quantizes them.

    Attributes:
        steps: of descent.
        penalty: of a row's largest weight, where a scale belongs to the whole row.
        group_penalty: of a group's, where it belongs to a group.
    """

    steps: int = 200
    penalty: float = 1e-3
    group_penalty: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.penalty <= 0 or self.group_penalty <= 0:
            raise ValueError("penalty and group_penalty must be positive")

    @property
    def name(self) -> str:
        return "magr"

    @property
    def mixes_rows(self) -> bool:
        return False

    def solve(self, solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        return solver.solve(replace(problem, weight=self._shrunk(problem, spec)), spec)

    def _shrunk(self, problem: LayerProblem, spec: GridSpec) -> Tensor:
        """The weight (out, in) of smaller range."""
        original = problem.weight
        spec.check_division(original.shape[1])
        size, penalty = spec.group_size or original.shape[1], self.group_penalty if spec.group_size else self.penalty
        hessian = problem.hessian / largest_eigenvalue(problem.hessian)
        weight = original
        for _ in range(self.steps):
            moved = weight - (weight - original) @ hessian
            groups = moved.reshape(-1, size)
            weight = (groups - penalty * on_l1_ball(groups / penalty)).view_as(original)
        # Nothing holds the weights of dead inputs where they are, so they would shrink as far as the steps go.
        return torch.where(problem.hessian.diagonal() == 0, original, weight)


def on_l1_ball(rows: Tensor) -> Tensor:
    """The nearest point of the l1 ball of radius 1 to each row (any, n); rows inside it stay.

    Duchi et al., 2008 (https://doi.org/10.1145/1390156.1390191), Figure 1: shrink all entries by the threshold that leaves a
    sum of 1.
    """
    sizes = rows.abs()
    ordered = sizes.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    counts = torch.arange(1, rows.shape[-1] + 1, device=rows.device, dtype=rows.dtype)
    kept = (ordered * counts > excess).sum(-1, keepdim=True).clamp(min=1)
    threshold = excess.gather(-1, kept - 1) / kept
    inside = sizes.sum(-1, keepdim=True) <= 1
    return torch.where(inside, rows, rows.sign() * (sizes - threshold).clamp(min=0))

"""Layer problems whose inputs have lost something in quantized blocks, and the papers' equations for them, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantease.grid import Grid
from quantease.layer import LayerProblem
from tests.problems import random_problem
from tests.reference import round_column


@dataclass(frozen=True, eq=False)
class Lossy:
    """A layer, and its inputs (tokens, in): `full` in the unquantized model, `left` behind the quantized blocks."""

    weight: Tensor
    full: Tensor
    left: Tensor

    @property
    def problem(self) -> LayerProblem:
        """In the dtype of the inputs; every second token belongs to the half."""
        lost, left = self.full - self.left, self.left
        half = lost[::2].T @ left[::2]
        mean = left.abs().mean(0)
        return LayerProblem(self.weight, left.T @ left, mean_input=mean, cross=lost.T @ left, cross_half=half)

    @property
    def double(self) -> LayerProblem:
        """In double precision, in which no rounding is a tie."""
        return Lossy(self.weight.double(), self.full.double(), self.left.double()).problem

    def error(self, weight: Tensor) -> float:
        """||W X - W^ X^||^2 / ||W X||^2 of the outputs."""
        outputs = self.full.double() @ self.weight.double().T
        return ((outputs - self.left.double() @ weight.double().T).square().sum() / outputs.square().sum()).item()


def lossy(
    out_features: int = 32, in_features: int = 128, seed: int = 0, noise: float = 0.3, tokens: int | None = None
) -> Lossy:
    """Correlated inputs of very unequal size, as in `random_problem`, that have shrunk and been mixed with noise."""
    g = torch.Generator().manual_seed(seed)
    count = tokens or 8 * in_features
    mixing = torch.randn(in_features, in_features, generator=g) / in_features**0.5
    sizes = torch.logspace(0, -1.5, in_features)[torch.randperm(in_features, generator=g)]
    full = torch.randn(count, in_features, generator=g) @ mixing * sizes
    kept = 1 - noise * torch.rand(in_features, generator=g)
    left = full * kept + noise * torch.randn(count, in_features, generator=g) @ mixing * sizes
    return Lossy(random_problem(out_features, in_features, seed).weight, full, left)


def gptaq(problem: LayerProblem, grid: Grid, alpha: float, damping: float, order_refit: bool = False) -> Tensor:
    """GPTAQ (Li et al., 2025), column by column with explicit inverses: no Cholesky factor, no triangular solve.

    e = w_j - q_j; the columns R after j take -e [H_F^-1]_jR / [H_F^-1]_jj, where F is j and R, and
    w_j alpha C_jR (H_RR)^-1. With `order_refit`, the grid of a group is fitted when its first column comes up, to what
    its weights will be if nothing more is rounded.
    """
    w, h = problem.weight.double().clone(), problem.hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    assert problem.cross is not None
    met: set[int] = set()
    for j in range(w.shape[1]):
        if order_refit and (group := int(grid.group[j])) not in met:
            met.add(group)
            ahead = w.clone()
            for k in range(j, w.shape[1]):
                ahead[:, k + 1 :] += _handed_on(ahead, problem.cross, h, alpha, k)
            grid.fit_group_(group, ahead[:, grid.group == group], grid.columns())
        inverse = torch.linalg.inv(h[j:, j:])
        q = round_column(grid, w[:, j], j)
        feedback = -(w[:, j] - q)[:, None] * inverse[0, 1:] / inverse[0, 0]
        w[:, j + 1 :] += feedback + _handed_on(w, problem.cross, h, alpha, j)
        w[:, j] = q
    return w


def _handed_on(w: Tensor, cross: Tensor, h: Tensor, alpha: float, j: int) -> Tensor:
    rest = slice(j + 1, None)
    return alpha * w[:, j, None] * (cross.double()[j, rest] @ torch.linalg.inv(h[rest, rest]))


def qronos(problem: LayerProblem, grid: Grid, damping: float) -> Tensor:
    """Qronos (Zhang et al., 2025), with G = X X^^T; `damping` is l as a fraction of the largest eigenvalue of H."""
    w, h = problem.weight.double(), problem.hessian.double()
    assert problem.cross is not None
    g = problem.cross.double() + h
    ridge = damping * torch.linalg.eigvalsh(h)[-1] * torch.eye(len(h))
    first = (w @ g[:, 0] - w[:, 1:] @ h[1:, 0]) / h[0, 0]
    q = round_column(grid, first, 0)[:, None]
    s = torch.linalg.inv((h + ridge)[1:, 1:])
    rest = (w @ (g + ridge)[:, 1:] - q * h[0, 1:]) @ s
    for j in range(rest.shape[1]):  # optimal brain quantization of the rest, as in tests/reference.py
        rounded = round_column(grid, rest[:, j], j + 1)
        rest[:, j + 1 :] -= ((rest[:, j] - rounded) / s[j, j])[:, None] * s[j, j + 1 :]
        rest[:, j] = rounded
        s = s - torch.outer(s[:, j], s[j]) / s[j, j]
    return torch.cat([q, rest], 1)


def corrected(problem: LayerProblem, cross: Tensor, share: float, damping: float) -> Tensor:
    """QEP (Arai and Ichikawa, 2025): W + share W C (H + l mean(diag H) I)^-1."""
    w, h = problem.weight.double(), problem.hessian.double()
    ridge = damping * h.diagonal().mean() * torch.eye(len(h))
    return w + share * w @ cross.double() @ torch.linalg.inv(h + ridge)

"""Slow float64 transcriptions of the papers' equations, to hold the solvers to."""

import torch
from torch import Tensor

from quantease.grid import Grid
from quantease.layer import LayerProblem


def round_column(grid: Grid, values: Tensor, column: int) -> Tensor:
    """q_i of the papers: the nearest grid point, for one column (out,)."""
    scale = grid.scale[:, grid.group[column]].double()
    zero = grid.zero[:, grid.group[column]].double()
    return scale * ((torch.round(values / scale) + zero).clamp(0, grid.spec.max_code) - zero)


def quantease(problem: LayerProblem, grid: Grid, start: Tensor, rounded_sweeps: list[bool]) -> Tensor:
    """QuantEase, Lemma 1 and Algorithm 1, one column and one inner product at a time.

    beta_j = (sum_k W_k S_kj - sum_{k != j} W_hat_k S_kj) / S_jj with S = X X^T; then W_hat_j = q(beta_j), or beta_j in a
    sweep that is not rounded.
    """
    w, s = problem.weight.double(), problem.hessian.double()
    w_hat = start.double().clone()
    for rounds in rounded_sweeps:
        for j in range(w.shape[1]):
            others = torch.arange(w.shape[1]) != j
            beta = (w @ s[:, j] - w_hat[:, others] @ s[others, j]) / s[j, j]
            w_hat[:, j] = round_column(grid, beta, j) if rounds else beta
    return w_hat


def gptq(problem: LayerProblem, grid: Grid, damping: float) -> Tensor:
    """GPTQ, Section 3: optimal brain quantization in a fixed order, the inverse Hessian updated by equation (3).

    Rounds column j, adds -(w_j - q(w_j)) / [H^-1]_jj * [H^-1]_j,: to the columns that remain, and removes j from H^-1 by
    Gaussian elimination: no Cholesky factor, no blocks.
    """
    w = problem.weight.double().clone()
    h = problem.hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    for j in range(w.shape[1]):
        error = (w[:, j] - round_column(grid, w[:, j], j)) / inverse[j, j]
        w[:, j] = round_column(grid, w[:, j], j)
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w

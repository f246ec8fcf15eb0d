"""Slow float64 transcriptions of the papers' equations, to hold the solvers to."""

from dataclasses import replace

import torch
from torch import Tensor

from quantease.grid import Grid
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem


def round_column(grid: Grid, values: Tensor, column: int) -> Tensor:
    """q_i of the papers: the nearest grid point, for one column (out,)."""
    assert isinstance(grid, UniformGrid)
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


def gptq(problem: LayerProblem, grid: Grid, damping: float, refit: bool = False) -> Tensor:
    """GPTQ, Section 3: optimal brain quantization in a fixed order, the inverse Hessian updated by equation (3).

    Rounds column j, adds -(w_j - q(w_j)) / [H^-1]_jj * [H^-1]_j,: to the columns that remain, and removes j from H^-1 by
    Gaussian elimination: no Cholesky factor, no blocks. With `refit` a group's grid is fitted to the weights as they are
    when its first column comes up.
    """
    assert isinstance(grid, UniformGrid)
    met: set[int] = set()
    w = problem.weight.double().clone()
    h = problem.hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    for j in range(w.shape[1]):
        group = int(grid.group[j])
        if refit and group not in met:
            mine = UniformGrid.fit(w[:, grid.group == group], replace(grid.spec, group_size=None))
            grid.scale[:, group], grid.zero[:, group] = mine.scale[:, 0].to(grid.scale), mine.zero[:, 0].to(grid.zero)
        met.add(group)
        error = (w[:, j] - round_column(grid, w[:, j], j)) / inverse[j, j]
        w[:, j] = round_column(grid, w[:, j], j)
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w


def ldlq(problem: LayerProblem, grid: Grid) -> Tensor:
    """LDLQ of QuIP (Chee et al., 2023, https://arxiv.org/abs/2307.13304), Section 3.1.

    With H = (U + I) D (U + I)^T, U strictly upper triangular, W_hat_k = q(W_k + (W - W_hat)_{<k} U_{<k, k}).
    """
    w, h = problem.weight.double(), problem.hessian.double()
    flipped = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # upper triangular, H = R R^T
    upper = flipped / flipped.diagonal()
    w_hat = torch.zeros_like(w)
    for k in range(w.shape[1]):
        w_hat[:, k] = round_column(grid, w[:, k] + (w[:, :k] - w_hat[:, :k]) @ upper[:k, k], k)
    return w_hat


def outlier_quantease(problem: LayerProblem, grid: Grid, count: int, rounded_sweeps: list[bool], rate: float) -> Tensor:
    """Outlier-aware QuantEase, Algorithm 3, unstructured: W_hat + H_hat after the last pair of steps.

    H_hat starts as the `count` largest entries of W; `rate` is 1 / L of equation (20) times 2.
    """
    w, s = problem.weight.double(), problem.hessian.double()
    sparse = largest(w, count)
    w_hat = w - sparse
    for rounds in rounded_sweeps:
        target = w - sparse
        for j in range(w.shape[1]):
            others = torch.arange(w.shape[1]) != j
            beta = (target @ s[:, j] - w_hat[:, others] @ s[others, j]) / s[j, j]
            w_hat[:, j] = round_column(grid, beta, j) if rounds else beta
        sparse = largest(sparse + rate * (w - w_hat - sparse) @ s, count)
    return w_hat + sparse


def largest(values: Tensor, count: int) -> Tensor:
    """P_s of the paper: all but the `count` largest entries set to zero."""
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[values.abs().flatten().argsort(descending=True)[:count]] = True
    return values * kept.view_as(values)

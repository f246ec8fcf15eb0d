"""Layer-wise problems for tests: ill-conditioned like real activations, with outlying inputs and dead ones on request."""

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from quantease.grid import Grid
from quantease.layer import LayerProblem


def random_problem(out_features: int = 32, in_features: int = 128, seed: int = 0) -> LayerProblem:
    """Correlated inputs of very unequal size; float32."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=g)
    sizes = torch.logspace(0, -1.5, in_features)[torch.randperm(in_features, generator=g)]
    inputs = torch.randn(4 * in_features, in_features, generator=g) @ mixing * sizes
    weight = torch.randn(out_features, in_features, generator=g)
    return LayerProblem(weight, inputs.T @ inputs, mean_input=inputs.abs().mean(0))


def in_double(problem: LayerProblem) -> LayerProblem:
    """The problem in double precision, in which no rounding is a tie."""
    return replace(problem, weight=problem.weight.double(), hessian=problem.hessian.double())


def with_dead_columns(problem: LayerProblem, dead: list[int]) -> LayerProblem:
    """The problem with inputs that are always zero."""
    assert problem.mean_input is not None
    hessian, mean_input = problem.hessian.clone(), problem.mean_input.clone()
    hessian[dead], hessian[:, dead], mean_input[dead] = 0, 0, 0
    return replace(problem, hessian=hessian, mean_input=mean_input)


def best_codes(problem: LayerProblem, grid: Grid) -> Tensor:
    """The codes that minimize the objective, by trying all of them; for a handful of columns."""
    count = problem.weight.shape[1]
    choices = torch.tensor(list(itertools.product(range(grid.spec.max_code + 1), repeat=count)), dtype=torch.uint8)
    codes = range(grid.spec.max_code + 1)
    values = torch.stack([grid.decode(torch.full(problem.weight.shape, code, dtype=torch.uint8)) for code in codes])
    best = []
    for row in range(len(problem.weight)):
        chosen = values[choices.long(), row, torch.arange(count)]  # (choices, in)
        difference = (problem.weight[row] - chosen).double()
        errors = torch.einsum("ci,ij,cj->c", difference, problem.hessian.double(), difference)
        best.append(choices[errors.argmin()])
    return torch.stack(best)

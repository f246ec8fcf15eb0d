"""K-best Babai's own mathematics."""

import math

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from baselines.k_babai import KBabai, sharpness_for
from quantease.grid import Grid, GridSpec
from quantease.grids.nf4 import NF4
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem
from tests.problems import in_double, random_problem

SPECS = [GridSpec(3), GridSpec(4, group_size=16), GridSpec(3, symmetric=True)]


def row_errors(problem: LayerProblem, weight: Tensor) -> Tensor:
    difference = weight - problem.weight
    return ((difference @ problem.hessian) * difference).sum(1)


def klein(problem: LayerProblem, grid: Grid, draws: Tensor, sharpness: float) -> Tensor:
    """One random path: of the two levels around c_j the upper one, if the uniform number exceeds the lower's odds.

    R_jj^2 is what is left of H_jj once the later columns make up for column j as well as they can: a Schur complement.
    """
    assert isinstance(grid, UniformGrid)
    h = problem.hessian + 0.01 * problem.hessian.diagonal().mean() * torch.eye(len(problem.hessian))
    count = len(h)
    solved = [torch.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j]) for j in range(count)]
    cost = torch.stack([h[j, j] - h[j, j + 1 :] @ solved[j] for j in range(count)])
    scale, zero = grid.scale[:, grid.group].double(), grid.zero[:, grid.group].double()  # (out, in)
    t = sharpness / (cost * scale.square()).amin(1)  # (out,)
    w, q = problem.weight.clone(), torch.empty_like(problem.weight)
    for j in range(count):
        codes = w[:, j] / scale[:, j] + zero[:, j]
        below = codes.floor()
        weights = [torch.exp(-t * cost[j] * (scale[:, j] * (codes - level)).square()) for level in (below, below + 1)]
        up = draws[j] > weights[0] / (weights[0] + weights[1])
        q[:, j] = ((below + up).clamp(0, grid.spec.max_code) - zero[:, j]) * scale[:, j]
        w[:, j + 1 :] -= torch.outer(q[:, j] - w[:, j], solved[j])
    return q


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_paths_are_kleins_and_each_row_has_its_best(spec: GridSpec) -> None:
    problem = in_double(random_problem(16, 48))
    grid, sharpness = problem.fit_grid(spec), 3.0
    draws = torch.rand(4, 48, 1, generator=torch.Generator().manual_seed(7)).double()
    paths = [GPTQ(static_groups=True).solve(problem, spec).weight]
    paths += [klein(problem, grid, path[:, 0], sharpness) for path in draws]
    errors = torch.stack([row_errors(problem, path) for path in paths])
    best = errors.argmin(0)
    assert len(best.unique()) >= 3  # not one path for all
    answer = KBabai(4, sharpness, seed=7).solve(problem, spec)
    torch.testing.assert_close(answer.weight, torch.stack(paths)[best, torch.arange(16)])


@pytest.mark.parametrize("spec", [*SPECS, GridSpec(4, group_size=64, format=NF4())], ids=str)
def test_no_row_is_worse_than_gptqs_and_most_are_better(spec: GridSpec) -> None:
    problem = random_problem()
    gptq = row_errors(problem, GPTQ(static_groups=True).solve(problem, spec).weight)
    mine = row_errors(problem, KBabai().solve(problem, spec).weight)
    assert (mine <= gptq * (1 + 1e-6)).all()
    assert (mine < gptq).float().mean() > 0.5


def test_the_sharper_the_nearer_to_gptq() -> None:
    problem = random_problem()
    codes = [KBabai(sharpness=sharpness).solve(problem, GridSpec(3)).codes for sharpness in (3.0, 1e9)]
    gptq = GPTQ().solve(problem, GridSpec(3)).codes
    assert torch.equal(codes[1], gptq)
    assert not torch.equal(codes[0], gptq)


@pytest.mark.parametrize(("paths", "columns"), [(5, 128), (20, 4096), (2, 1)])
def test_the_sharpness_solves_its_equation(paths: int, columns: int) -> None:
    rho = math.exp(sharpness_for(paths, columns))
    assert (math.e * rho) ** (2 * columns / rho) == pytest.approx(paths)


def test_a_seed_is_an_answer() -> None:
    problem = random_problem()
    first, again, other = (KBabai(seed=seed).solve(problem, GridSpec(3)).codes for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("wrong", [{"paths": 0}, {"sharpness": 0.0}, {"damping": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        KBabai(**wrong)  # pyright: ignore[reportArgumentType]

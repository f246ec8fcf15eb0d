"""FOEM's own mathematics."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.foem import FOEM
from baselines.gptq import GPTQ
from quantease.act_order import ActOrder
from quantease.grid import Grid, GridSpec
from quantease.grids.nvfp4 import NVFP4
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem
from tests import reference
from tests.problems import in_double, random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=50), GridSpec(4, symmetric=True)]


def first_order(problem: LayerProblem, grid: Grid, beta: float, refit: bool) -> Tensor:
    """The equations of the method, a column at a time; with `refit`, groups are fitted when their first column comes up."""
    assert isinstance(grid, UniformGrid)
    original, w, q = problem.weight, problem.weight.clone(), torch.empty_like(problem.weight)
    h = problem.hessian + 0.01 * problem.hessian.diagonal().mean() * torch.eye(len(problem.hessian))
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    met: set[int] = set()
    for j in range(w.shape[1]):
        group = int(grid.group[j])
        if refit and group not in met:
            mine = UniformGrid.fit(w[:, grid.group == group], replace(grid.spec, group_size=None))
            grid.scale[:, group], grid.zero[:, group] = mine.scale[:, 0].to(grid.scale), mine.zero[:, 0].to(grid.zero)
        met.add(group)
        w[:, j] -= beta * (w[:, j] - original[:, j])  # nothing for the first column, which has not moved
        q[:, j] = reference.round_column(grid, w[:, j], j)
        error = ((w[:, j] - q[:, j]) - beta * (w[:, j] - original[:, j])) / u[j, j]
        w[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
    return q


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_equations_of_the_method(spec: GridSpec, static_groups: bool) -> None:
    problem = in_double(random_problem(12, 200))  # more than one column block
    expected = first_order(problem, problem.fit_grid(spec), 0.2, refit=not static_groups)
    torch.testing.assert_close(FOEM(static_groups=static_groups).solve(problem, spec).weight, expected)


def test_it_is_in_act_order_too() -> None:
    problem = in_double(random_problem(8, 96))
    order = problem.hessian.diagonal().argsort(descending=True, stable=True)
    sorted_problem = problem.permuted(order)
    spec = GridSpec(3, group_size=32)
    expected = first_order(sorted_problem, sorted_problem.fit_grid(spec), 0.1, refit=True)
    torch.testing.assert_close(ActOrder(FOEM(0.1)).solve(problem, spec).weight[:, order], expected)


def test_it_agrees_in_float32_up_to_ties() -> None:
    problem = random_problem(32, 200)
    expected = first_order(in_double(problem), problem.fit_grid(GridSpec(3)), 0.2, refit=False)
    answer = FOEM().solve(problem, GridSpec(3))
    assert (answer.weight - expected).abs().gt(1e-4).float().mean() < 0.01


@pytest.mark.parametrize("spec", [*SPECS, GridSpec(4, group_size=16, format=NVFP4())], ids=str)
def test_without_beta_it_is_gptq(spec: GridSpec) -> None:
    problem = in_double(random_problem(8, 400))
    if spec.format is not None:  # its scales are float32
        problem = random_problem(8, 400)
    assert torch.equal(FOEM(0.0).solve(problem, spec).codes, GPTQ().solve(problem, spec).codes)


@pytest.mark.parametrize("wrong", [{"beta": -0.1}, {"beta": 1.0}, {"damping": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        FOEM(**wrong)  # pyright: ignore[reportArgumentType]

"""The exam that every method takes by existing: a new file in conf/method/ is tested here."""

from pathlib import Path

import pytest
import torch

from baselines.rtn import RTN
from quantease.grid import GridSpec
from quantease.layer import ActOrder, LayerProblem, LayerSolver
from runners.checking import check
from tests.problems import random_problem

METHODS = sorted(path.stem for path in Path("conf/method").glob("*.yaml") if path.stem != "fp16")
SPECS = [
    GridSpec(3),
    GridSpec(2, group_size=32),
    GridSpec(4, symmetric=True),
    GridSpec(3, group_size=64, symmetric=True),
    GridSpec(8, scale_bits=32),
]


@pytest.fixture(params=METHODS, scope="module")
def solver(request: pytest.FixtureRequest) -> LayerSolver:
    (settings,) = check([f"method={request.param}"], multirun=False)
    return settings.solver


@pytest.fixture(params=SPECS, ids=str)
def spec(request: pytest.FixtureRequest) -> GridSpec:
    return request.param


@pytest.fixture(scope="module")
def problem() -> LayerProblem:
    return random_problem()


def test_codes_are_on_the_grid(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    layer = solver.solve(problem, spec)
    assert layer.codes.dtype == torch.uint8
    assert layer.codes.shape == problem.weight.shape
    assert int(layer.codes.max()) <= spec.max_code
    group_size = spec.group_size or problem.weight.shape[1]
    for row in layer.weight.reshape(-1, group_size):
        assert len(row.unique()) <= 2**spec.bits


def test_inputs_are_left_alone_and_answers_repeat(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    weight, hessian = problem.weight.clone(), problem.hessian.clone()
    first, second = solver.solve(problem, spec), solver.solve(problem, spec)
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.hessian, hessian)
    assert torch.equal(first.codes, second.codes)


def test_never_worse_than_rounding_to_nearest(solver: LayerSolver, spec: GridSpec) -> None:
    for seed in range(4):
        problem = random_problem(seed=seed)
        rtn = problem.relative_error(RTN().solve(problem, spec).weight)
        assert problem.relative_error(solver.solve(problem, spec).weight) <= rtn


def test_a_diagonal_hessian_gives_exactly_rtn(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    diagonal = LayerProblem(problem.weight, problem.hessian.diagonal().diag())
    assert torch.equal(solver.solve(diagonal, spec).codes, RTN().solve(diagonal, spec).codes)


def test_the_hessians_scale_does_not_matter(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    scaled = LayerProblem(problem.weight, problem.hessian / 1024)  # a power of two, so exact in floating point
    assert torch.equal(solver.solve(problem, spec).codes, solver.solve(scaled, spec).codes)


def test_dead_columns_are_rounded_to_nearest(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    hessian = problem.hessian.clone()
    dead = [5, 6, 100]
    hessian[dead], hessian[:, dead] = 0, 0
    problem = LayerProblem(problem.weight, hessian)
    assert problem.dead_columns == 3
    layer = solver.solve(problem, spec)
    assert torch.equal(layer.codes[:, dead], RTN().solve(problem, spec).codes[:, dead])
    assert torch.isfinite(layer.weight).all()


def test_act_order_returns_columns_and_groups_to_their_places(solver: LayerSolver, spec: GridSpec) -> None:
    problem = random_problem(seed=3)
    layer = ActOrder(solver).solve(problem, spec)
    rtn = RTN().solve(problem, spec)
    assert torch.equal(layer.grid.group, rtn.grid.group)
    assert torch.equal(layer.grid.scale, rtn.grid.scale)
    assert problem.relative_error(layer.weight) <= problem.relative_error(rtn.weight)


def test_act_order_is_nothing_but_another_order(solver: LayerSolver) -> None:
    problem = random_problem(seed=4)
    order = problem.hessian.diagonal().argsort(descending=True)
    by_hand = solver.solve(LayerProblem(problem.weight[:, order], problem.hessian[order][:, order]), GridSpec(3))
    assert torch.equal(ActOrder(solver).solve(problem, GridSpec(3)).codes[:, order], by_hand.codes)


def test_all_methods_round_to_the_same_grid(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    mine, rtn = solver.solve(problem, spec).grid, RTN().solve(problem, spec).grid
    assert torch.equal(mine.scale, rtn.scale)
    assert torch.equal(mine.zero, rtn.zero)


def test_one_row_and_one_column(solver: LayerSolver) -> None:
    for shape in ((1, 8), (8, 1), (1, 1)):
        problem = random_problem(*shape)
        layer = solver.solve(problem, GridSpec(3))
        assert layer.codes.shape == shape
        assert problem.relative_error(layer.weight) <= problem.relative_error(RTN().solve(problem, GridSpec(3)).weight)


def test_a_weight_of_zeros_stays_zero(solver: LayerSolver) -> None:
    problem = random_problem(4, 16)
    layer = solver.solve(LayerProblem(torch.zeros(4, 16), problem.hessian), GridSpec(2))
    assert layer.weight.eq(0).all()


def test_rows_are_independent(solver: LayerSolver, spec: GridSpec) -> None:
    problem = random_problem(seed=5)
    some = LayerProblem(problem.weight[10:20], problem.hessian)
    whole = solver.solve(problem, spec).codes[10:20]
    assert (
        solver.solve(some, spec).codes != whole
    ).float().mean() < 2e-3  # sums in another order flip a tie now and then

"""The exam that every method takes: a new file in conf/method/ is tested here without a line of code.

`solver` runs over all methods. `shared` runs over those whose answer depends on the shared grid alone, which is every
new method unless it is listed in OWN_GRID because it fits a grid of its own or keeps weights outside of it. A method that
refuses a grid with `Unsupported` is skipped there. Tests of one method's own mathematics are in test_<method>.py.
"""

from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.qronos import Qronos
from baselines.rtn import RTN
from baselines.spqr import SpQR
from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.grids.mxfp4 import MXFP4
from quantease.grids.nf4 import NF4
from quantease.grids.nvfp4 import NVFP4
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from quantease.transform import Transformed
from runners.config.command_line import check
from tests.problems import random_problem, with_dead_columns

METHODS = sorted(path.stem for path in Path("conf/method").glob("*.yaml") if path.stem not in ("fp16", "stored"))
OWN_GRID = {
    "spqr",
    "spqr_1pct",
    "awq",
    "quantease_refit",
    "gptq_refit",
    "awq_refit",
    "quantease_best",
    "quantease_outlier",
    "quantease_structured",
}  # and outliers
SHARED_GRID = [name for name in METHODS if name not in OWN_GRID]  # every new method, unless it says otherwise
SPECS = [
    GridSpec(3),
    GridSpec(2, group_size=32),
    GridSpec(4, symmetric=True),
    GridSpec(3, group_size=64, symmetric=True),
    GridSpec(8, scale_bits=32),
    GridSpec(3, group_size=32, range="mse"),
    GridSpec(4, group_size=64, format=NF4()),
    GridSpec(4, group_size=32, format=MXFP4()),
    GridSpec(4, group_size=16, format=NVFP4()),
]


# Compositions of methods that take the exam themselves, and searches around them: theirs takes a quarter of all the time.
LONG = {"spqr_1pct", "awq_refit", "gptq_refit", "qep_gptq", "quantease_best"}


def _marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in names]


@cache
def build_solver(name: str) -> LayerSolver:
    (settings,) = check([f"method={name}"], multirun=False)
    return settings.run.solver


@pytest.fixture(params=_marked(METHODS), scope="module")
def solver(request: pytest.FixtureRequest) -> LayerSolver:
    return build_solver(request.param)


@pytest.fixture(params=_marked(SHARED_GRID), scope="module")
def shared(request: pytest.FixtureRequest) -> LayerSolver:
    """A method whose answer depends on nothing but the grid that all share, row by row."""
    return build_solver(request.param)


def solve(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
    try:
        return solver.solve(problem, spec)
    except Unsupported as refusal:
        pytest.skip(str(refusal))


def beats_rounding(solver: LayerSolver, spec: GridSpec) -> None:
    """Skips where that is not to be expected."""
    if isinstance(solver, SpQR) and spec.bits == 8:
        pytest.skip("SpQR's 3-bit scales and zero points are too coarse for 8-bit codes")
    if isinstance(solver, Qronos):
        pytest.skip("with its published damping GPTQ itself can end above rounding: tests/comparators/test_qronos.py")


@pytest.fixture(params=SPECS, ids=str)
def spec(request: pytest.FixtureRequest) -> GridSpec:
    return request.param


@pytest.fixture(scope="module")
def problem() -> LayerProblem:
    return random_problem()


def test_at_most_two_to_the_bits_values_a_row_and_group_off_the_outliers(
    solver: LayerSolver, problem: LayerProblem, spec: GridSpec
) -> None:
    layer = solve(solver, problem, spec)
    assert layer.codes.dtype == torch.uint8
    assert layer.codes.shape == problem.weight.shape
    assert int(layer.codes.max()) <= spec.max_code
    weight = layer.weight if layer.column_scale is None else layer.weight * layer.column_scale
    kept = torch.zeros_like(weight, dtype=torch.bool)
    if layer.outliers is not None:
        kept[layer.outliers.rows, layer.outliers.columns] = True
    for group in layer.grid.group.unique():
        mine = layer.grid.group == group
        steps = layer.grid.scale[:, group]
        for row, off, step in zip(weight[:, mine], ~kept[:, mine], steps, strict=True):
            if off.any():  # values that rounding has moved by less than a thousandth of a step are one
                assert 1 + (row[off].sort().values.diff() > step / 1024).sum() <= 2**spec.bits


def test_inputs_are_left_alone_and_answers_repeat(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    weight, hessian = problem.weight.clone(), problem.hessian.clone()
    first, second = solve(solver, problem, spec), solve(solver, problem, spec)
    assert torch.equal(problem.weight, weight)
    assert torch.equal(problem.hessian, hessian)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.weight, second.weight)


def test_never_worse_than_rounding_to_nearest(solver: LayerSolver, spec: GridSpec) -> None:
    """On the same grid: groups that GPTQ fits to compensated weights, whose range has grown, can be worse at 2 bits."""
    beats_rounding(solver, spec)
    for seed in range(4):
        problem = random_problem(seed=seed)
        rtn = problem.relative_error(RTN().solve(problem, spec).weight)
        assert problem.relative_error(solve(_static(solver), problem, spec).weight) <= rtn


def test_a_diagonal_hessian_gives_exactly_rtn(shared: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    diagonal = replace(problem, hessian=problem.hessian.diagonal().diag())
    assert torch.equal(solve(shared, diagonal, spec).codes, RTN().solve(diagonal, spec).codes)


def test_the_hessians_scale_does_not_matter(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    assert problem.mean_input is not None
    scaled = replace(problem, hessian=problem.hessian / 1024, mean_input=problem.mean_input / 32)  # exact powers of two
    assert torch.equal(solve(solver, problem, spec).codes, solve(solver, scaled, spec).codes)


def test_the_hessians_scale_does_not_matter_beside_dead_columns_either(solver: LayerSolver) -> None:
    problem = with_dead_columns(random_problem(), list(range(0, 128, 3)))
    assert problem.mean_input is not None
    small = replace(problem, hessian=problem.hessian * 2.0**-20, mean_input=problem.mean_input * 2.0**-10)
    first, second = solve(solver, problem, GridSpec(3)), solve(solver, small, GridSpec(3))
    assert torch.equal(first.codes, second.codes)
    assert first.damping == second.damping


def test_dead_columns_are_rounded_to_nearest(solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    dead = [5, 6, 100]
    problem = with_dead_columns(problem, dead)
    assert problem.dead_columns == 3
    layer = solve(solver, problem, spec)
    weight = problem.weight if layer.column_scale is None else problem.weight * layer.column_scale
    assert torch.equal(layer.codes[:, dead], layer.grid.encode(weight)[:, dead])
    assert torch.isfinite(layer.weight).all()


def test_act_order_returns_columns_to_their_places(solver: LayerSolver, spec: GridSpec) -> None:
    beats_rounding(solver, spec)
    problem = random_problem(seed=3)
    layer = solve(ActOrder(solver), problem, spec)
    assert problem.relative_error(layer.weight) <= problem.relative_error(RTN().solve(problem, spec).weight)


def test_act_order_leaves_the_groups_as_they_are(shared: LayerSolver, spec: GridSpec) -> None:
    problem = random_problem(seed=3)
    layer = solve(ActOrder(shared), problem, spec)
    assert torch.equal(layer.grid.group, RTN().solve(problem, spec).grid.group)


def test_act_order_is_nothing_but_another_order(solver: LayerSolver) -> None:
    problem = random_problem(seed=4)
    order = problem.hessian.diagonal().argsort(descending=True)
    by_hand = solver.solve(replace(problem.permuted(order), order=None), GridSpec(3))
    assert torch.equal(ActOrder(solver).solve(problem, GridSpec(3)).codes[:, order], by_hand.codes)


def test_all_methods_round_to_the_same_grid(shared: LayerSolver, problem: LayerProblem, spec: GridSpec) -> None:
    """Given the same options: GPTQ's groups, too, are fitted to the original weights."""
    mine, rtn = solve(_static(shared), problem, spec).grid, RTN().solve(problem, spec).grid
    assert torch.equal(mine.scale, rtn.scale)
    if isinstance(mine, UniformGrid) and isinstance(rtn, UniformGrid):
        assert torch.equal(mine.zero, rtn.zero)


def _static(solver: LayerSolver) -> LayerSolver:
    """With the groups of every method in it fitted to the original weights."""
    changes: dict[str, Any] = {}
    for field in fields(solver):  # pyright: ignore[reportArgumentType]
        value = getattr(solver, field.name)
        if field.name == "static_groups":
            changes[field.name] = True
        elif is_dataclass(value):  # a method inside of it
            changes[field.name] = _static(value)  # pyright: ignore[reportArgumentType]
    return replace(solver, **changes)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_one_row_and_one_column(solver: LayerSolver) -> None:
    for shape in ((1, 8), (8, 1), (1, 1)):
        problem = random_problem(*shape)
        layer = solver.solve(problem, GridSpec(3))
        assert layer.codes.shape == shape
        rtn = problem.relative_error(RTN().solve(problem, GridSpec(3)).weight)
        more = (
            5e-3 if isinstance(solver, SpQR | Transformed) else 1e-6
        )  # statistics of few bits; MagR shrinks the weight
        assert problem.relative_error(layer.weight) <= rtn + more


def test_a_weight_of_zeros_stays_zero(solver: LayerSolver) -> None:
    problem = random_problem(4, 16)
    layer = solver.solve(replace(problem, weight=torch.zeros(4, 16)), GridSpec(2))
    assert layer.weight.eq(0).all()


def test_rows_are_independent(shared: LayerSolver, spec: GridSpec) -> None:
    """Methods that say so are given layers that share an input as one."""
    if not (shared.rows_independent and spec.rows_independent):
        pytest.skip("does not say that it takes each row on its own")
    problem = random_problem(seed=5)
    some = replace(problem, weight=problem.weight[10:20])
    whole = solve(shared, problem, spec).codes[10:20]
    assert (
        solve(shared, some, spec).codes != whole
    ).float().mean() < 2e-3  # sums in another order flip a tie now and then


def test_bits_are_those_of_the_grid_and_what_is_beside_it(
    solver: LayerSolver, problem: LayerProblem, spec: GridSpec
) -> None:
    layer = solve(solver, problem, spec)
    beside = 0.0 if layer.outliers is None else layer.outliers.bits
    beside += 0 if layer.column_scale is None else 16 * problem.weight.shape[1]
    stored = layer.bits_per_weight * problem.weight.numel() - beside
    groups = layer.grid.scale.numel()
    assert stored >= (spec.bits * (1 - layer.outlier_ratio)) * problem.weight.numel() + groups

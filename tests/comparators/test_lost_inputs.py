"""What all methods that look at the cross moment have in common: a new one is examined by existing."""

from dataclasses import replace

import pytest
import torch

from baselines.gptq import GPTQ
from baselines.qep import CorrectedTarget
from baselines.qronos import Qronos
from quantease.act_order import ActOrder
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.grids.nf4 import NF4
from quantease.layer import LayerProblem, LayerSolver
from tests.comparators.lossy import lossy
from tests.problems import random_problem
from tests.solvers.test_every_method import METHODS, SPECS, build_solver

# A transform in front of a method is no part of what is asked here: quantease_best is MagR in front of qep_admm_q.
NAMES = [name for name in METHODS if build_solver(name).needs_cross and name != "quantease_best"]


def gentle(solver: LayerSolver) -> LayerSolver:
    """Qronos with a damping that suits the tests' ill-conditioned problems (see test_qronos.py)."""
    return replace(solver, damping=1e-3) if isinstance(solver, Qronos) else solver


def bare(solver: LayerSolver) -> LayerSolver:
    """The method that a method is where nothing was lost."""
    if isinstance(solver, CorrectedTarget):
        return solver.solver
    return ActOrder(GPTQ(static_groups=True)) if isinstance(solver, Qronos) else GPTQ()


def with_zero(problem: LayerProblem) -> LayerProblem:
    assert problem.cross is not None
    return replace(problem, cross=torch.zeros_like(problem.cross), cross_half=torch.zeros_like(problem.cross))


def test_these_methods_need_it() -> None:
    assert {"gptaq", "qep_gptq", "qep_quantease", "qronos", "quantease_paired"} <= set(NAMES)
    assert not QuantEase(init=GPTQ()).needs_cross
    assert QuantEase(init=build_solver("gptaq")).needs_cross
    assert ActOrder(build_solver("gptaq")).needs_cross


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_lost_is_no_cross_moment(name: str, spec: GridSpec) -> None:
    solver, problem = build_solver(name), random_problem(16, 128)
    zero = with_zero(replace(problem, cross=problem.hessian))
    assert torch.equal(solver.solve(zero, spec).codes, solver.solve(problem, spec).codes)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"qronos"}))
def test_without_a_cross_moment_each_is_the_method_that_it_extends(name: str) -> None:
    solver, problem = build_solver(name), random_problem(16, 128)
    for spec in (GridSpec(3), GridSpec(2, group_size=32), GridSpec(4, group_size=64, format=NF4())):
        expected = bare(solver).solve(problem, spec)
        for answer in (
            solver.solve(problem, spec),
            solver.solve(with_zero(replace(problem, cross=problem.hessian)), spec),
        ):
            assert torch.equal(answer.codes, expected.codes)
            assert torch.equal(answer.weight, expected.weight)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_come_nearer_to_those_of_the_unquantized_model(name: str, bits: int) -> None:
    """On average over layers whose inputs have lost something, in-sample as the objective is."""
    solver = gentle(build_solver(name))
    layers = [lossy(16, 64, seed, noise=0.2) for seed in range(6)]
    with_cross = [layer.error(solver.solve(layer.problem, GridSpec(bits)).weight) for layer in layers]
    without = [layer.error(bare(solver).solve(layer.problem, GridSpec(bits)).weight) for layer in layers]
    assert sum(with_cross) < sum(without)


@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(2, group_size=32), GridSpec(4, group_size=16)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_act_order_is_nothing_but_another_order(name: str, spec: GridSpec) -> None:
    solver, problem = build_solver(name), lossy(8, 64, seed=1).problem
    answer = ActOrder(solver).solve(problem, spec)
    order = problem.hessian.diagonal().argsort(descending=True, stable=True)
    again = solver.solve(problem.permuted(order), spec)
    assert torch.equal(answer.codes[:, order], again.codes)
    assert torch.equal(answer.grid.group, problem.fit_grid(spec).group)


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_scale_of_the_inputs_nor_of_the_weights_matters(name: str) -> None:
    solver, problem = build_solver(name), lossy(8, 64, seed=2).problem
    answer = solver.solve(problem, GridSpec(3))
    for exponent in (-40, -12, 24):
        assert problem.cross is not None
        assert problem.cross_half is not None
        factor = 2.0**exponent
        moments = {"cross": problem.cross * factor, "cross_half": problem.cross_half * factor}
        small = replace(problem, hessian=problem.hessian * factor, **moments)
        assert torch.equal(solver.solve(small, GridSpec(3)).codes, answer.codes)
        scaled = solver.solve(replace(problem, weight=problem.weight * factor), GridSpec(3))
        assert torch.equal(scaled.codes, answer.codes)
        assert torch.equal(scaled.weight, answer.weight * factor)


@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs_are_rounded_to_nearest_whatever_they_were(name: str) -> None:
    """Inputs that the quantized blocks have lost altogether: nothing of x^ is left, but x was there."""
    solver, layer = build_solver(name), lossy(8, 64, seed=3)
    dead = [0, 5, 63]
    layer.left[:, dead] = 0
    assert (layer.problem.cross[dead] != 0).any()  # pyright: ignore[reportOptionalSubscript]
    noisy = replace(layer.problem, cross=torch.ones(64, 64), cross_half=torch.ones(64, 64) / 2)
    for spec in (GridSpec(3), GridSpec(4, group_size=16, symmetric=True)):
        for problem in (layer.problem, noisy):
            answer = solver.solve(problem, spec)
            assert torch.equal(answer.codes[:, dead], answer.grid.encode(problem.weight)[:, dead])
            assert torch.isfinite(answer.weight).all()


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_independent_where_a_method_says_so(name: str) -> None:
    solver, problem = build_solver(name), lossy(24, 64, seed=4).problem
    assert solver.rows_independent == (name != "quantease_paired")
    if solver.rows_independent:
        some = solver.solve(replace(problem, weight=problem.weight[8:16]), GridSpec(3))
        assert (some.codes != solver.solve(problem, GridSpec(3)).codes[8:16]).float().mean() < 2e-3


@pytest.mark.parametrize("name", NAMES)
def test_problems_are_left_alone_and_answers_repeat(name: str) -> None:
    solver, problem = build_solver(name), lossy(8, 64, seed=5).problem
    names = ("weight", "hessian", "mean_input", "cross", "cross_half")
    before = {name: getattr(problem, name).clone() for name in names}
    first, second = (solver.solve(problem, GridSpec(3, group_size=32)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert all(torch.equal(getattr(problem, name), tensor) for name, tensor in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_too_few_tokens_and_narrow_layers(name: str) -> None:
    for shape, tokens in (((8, 64), 16), ((8, 1), 32), ((1, 1), 4)):
        layer = lossy(*shape, seed=6, tokens=tokens)
        answer = build_solver(name).solve(layer.problem, GridSpec(3))
        assert answer.codes.shape == shape
        assert torch.isfinite(answer.weight).all()

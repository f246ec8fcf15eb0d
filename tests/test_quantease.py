"""QuantEase's own mathematics."""

from itertools import pairwise

import pytest
import torch

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease import descent
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, objective
from quantease.quantease import QuantEase
from tests import reference
from tests.problems import best_codes, random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=32), GridSpec(4, symmetric=True)]
TINY_SPECS = [GridSpec(2), GridSpec(3), GridSpec(2, symmetric=True), GridSpec(2, group_size=2)]


def relative_gap(a: float, b: float) -> float:
    return abs(a - b) / b


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("relax_every", [None, 3])
def test_it_is_the_papers_algorithm(spec: GridSpec, relax_every: int | None) -> None:
    problem = random_problem()
    grid = problem.fit_grid(spec)
    rounded = [relax_every is None or t % 3 != 1 for t in range(6)]
    expected = reference.quantease(problem, grid, problem.weight, rounded)
    answer = QuantEase(num_iters=6, relax_every=relax_every).solve(problem, spec)
    assert relative_gap(problem.relative_error(answer.weight), problem.relative_error(expected.float())) < 1e-3
    assert (answer.weight - expected).abs().gt(1e-4).float().mean() < 0.01  # codes that differ are ties of float32


def test_in_double_precision_it_is_the_papers_algorithm_to_the_last_code() -> None:
    problem = random_problem(24, 150)
    problem = LayerProblem(problem.weight.double(), problem.hessian.double())
    grid = problem.fit_grid(GridSpec(3))
    rounded = [t != 1 for t in range(5)]  # the fifth would be relaxed, but it is the last
    expected = reference.quantease(problem, grid, problem.weight, rounded)
    answer = QuantEase(num_iters=5).solve(problem, GridSpec(3))
    assert torch.equal(answer.codes, grid.encode(expected))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("init", [None, RTN(), GPTQ()], ids=["W", "RTN", "GPTQ"])
def test_the_objective_never_rises_over_unrelaxed_sweeps(spec: GridSpec, init: RTN | GPTQ | None) -> None:
    for seed in range(3):
        answer = QuantEase(num_iters=12, relax_every=None, init=init, track_objective=True)
        history = answer.solve(random_problem(seed=seed), spec).history
        assert len(history) == 12
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(history))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_refines_what_it_starts_from(spec: GridSpec) -> None:
    problem = random_problem()
    gptq = problem.relative_error(GPTQ().solve(problem, spec).weight)
    refined = QuantEase(num_iters=3, relax_every=None, init=GPTQ()).solve(problem, spec)
    assert problem.relative_error(refined.weight) < gptq


def test_it_refines_towards_the_original_weights() -> None:
    """The authors' release takes GPTQ's answer for the target: then nothing would move."""
    problem = random_problem()
    gptq = GPTQ().solve(problem, GridSpec(3))
    refined = QuantEase(init=GPTQ()).solve(problem, GridSpec(3))
    assert (refined.codes != gptq.codes).float().mean() > 0.05
    assert objective(refined.weight - problem.weight, problem.hessian) < objective(
        gptq.weight - problem.weight, problem.hessian
    )


def test_what_the_start_had_to_do_is_passed_on() -> None:
    problem = random_problem(8, 32)
    problem = LayerProblem(problem.weight, problem.hessian - 0.05 * problem.hessian.diagonal().mean() * torch.eye(32))
    start = GPTQ().solve(problem, GridSpec(3))
    answer = QuantEase(init=GPTQ()).solve(problem, GridSpec(3))
    assert start.notes
    assert (answer.damping, answer.notes) == (start.damping, start.notes)


@pytest.mark.parametrize("spec", TINY_SPECS, ids=str)
def test_against_all_codes(spec: GridSpec) -> None:
    """Never below the optimum, at a point that no single code improves, and near the optimum on the average."""
    found, best = 0.0, 0.0
    for seed in range(20):
        problem = random_problem(8, 4, seed=seed)
        answer = QuantEase().solve(problem, spec)
        optimum = answer.grid.decode(best_codes(problem, answer.grid))
        value = objective(answer.weight - problem.weight, problem.hessian)
        assert value >= objective(optimum - problem.weight, problem.hessian) * (1 - 1e-5)
        for column in range(4):
            for code in range(spec.max_code + 1):
                codes = answer.codes.clone()
                codes[:, column] = code
                change = answer.grid.decode(codes) - problem.weight
                rows = (change @ problem.hessian * change).sum(1)
                now = answer.weight - problem.weight
                assert (rows >= (now @ problem.hessian * now).sum(1) * (1 - 1e-4) - 1e-6).all()
        found, best = found + value, best + objective(optimum - problem.weight, problem.hessian)
    assert found <= 1.6 * best


def test_the_size_of_a_block_changes_the_speed_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(32, 100)
    errors = []
    for block in (1, 7, 64, 1000):
        monkeypatch.setattr(descent, "BLOCK", block)
        errors.append(problem.relative_error(QuantEase(num_iters=9).solve(problem, GridSpec(3)).weight))
    assert max(errors) <= min(errors) * (1 + 2e-3)


def test_which_sweeps_are_relaxed() -> None:
    """The rule of the authors' code: t % 3 == 1, but not the last and none after 25."""
    solver = QuantEase(num_iters=30)
    assert [t for t in range(30) if not solver._rounds(t)] == [1, 4, 7, 10, 13, 16, 19, 22, 25]
    assert QuantEase(num_iters=2)._rounds(1)
    assert all(QuantEase(relax_every=None)._rounds(t) for t in range(30))


@pytest.mark.parametrize("wrong", [{"num_iters": 0}, {"relax_every": 1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        QuantEase(**wrong)  # pyright: ignore[reportArgumentType]

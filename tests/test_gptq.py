"""GPTQ's own mathematics."""

import pytest
import torch

from baselines.gptq import GPTQ
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, Unsupported
from tests import reference
from tests.problems import best_codes, random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=32), GridSpec(4, symmetric=True)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_optimal_brain_quantization_in_a_fixed_order(spec: GridSpec) -> None:
    problem = random_problem()
    expected = reference.gptq(problem, problem.fit_grid(spec), damping=0.01)
    answer = GPTQ().solve(problem, spec)
    assert (answer.weight - expected).abs().gt(1e-4).float().mean() < 0.01  # codes that differ are ties of float32
    error = problem.relative_error(expected.float())
    assert abs(problem.relative_error(answer.weight) - error) < 1e-3 * error


def test_in_double_precision_it_agrees_to_the_last_code() -> None:
    problem = random_problem(24, 150)
    problem = LayerProblem(problem.weight.double(), problem.hessian.double())
    grid = problem.fit_grid(GridSpec(3))
    expected = reference.gptq(problem, grid, damping=0.05)
    assert torch.equal(GPTQ(damping=0.05).solve(problem, GridSpec(3)).codes, grid.encode(expected))


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_the_size_of_a_block_changes_the_speed_and_not_the_result(block_size: int) -> None:
    problem = random_problem()
    whole = GPTQ().solve(problem, GridSpec(3)).codes
    assert (GPTQ(block_size=block_size).solve(problem, GridSpec(3)).codes != whole).float().mean() < 2e-3


def test_never_below_the_optimum() -> None:
    for seed in range(10):
        problem = random_problem(8, 4, seed=seed)
        answer = GPTQ().solve(problem, GridSpec(2))
        optimum = problem.relative_error(answer.grid.decode(best_codes(problem, answer.grid)))
        assert problem.relative_error(answer.weight) >= optimum * (1 - 1e-5)


def test_damping_is_raised_step_by_step_and_recorded() -> None:
    problem = random_problem(8, 32)
    lowest = torch.linalg.eigvalsh(problem.hessian)[0]
    shift = lowest + 0.05 * problem.hessian.diagonal().mean()
    indefinite = LayerProblem(problem.weight, problem.hessian - shift * torch.eye(32))
    answer = GPTQ(damping=0.01).solve(indefinite, GridSpec(3))
    assert answer.damping == pytest.approx(0.1)
    assert answer.notes == ("damping raised from 0.01 to 0.1",)
    assert GPTQ().solve(problem, GridSpec(3)).notes == ()


def test_singular_hessians_without_damping() -> None:
    x = torch.randn(4, 32)  # fewer tokens than columns
    answer = GPTQ(damping=0.0).solve(LayerProblem(torch.randn(8, 32), x.T @ x), GridSpec(3))
    assert answer.damping is not None
    assert answer.damping > 0
    assert answer.notes


def test_a_hessian_beyond_repair_is_refused() -> None:
    hessian = torch.eye(8)
    hessian[0, 1] = hessian[1, 0] = torch.nan
    with pytest.raises(Unsupported, match="cannot be factorized"):
        GPTQ().solve(LayerProblem(torch.randn(4, 8), hessian), GridSpec(3))


@pytest.mark.parametrize("wrong", [{"damping": -0.1}, {"block_size": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        GPTQ(**wrong)  # pyright: ignore[reportArgumentType]

"""GPTQ's own mathematics."""

import pytest
import torch

from baselines.gptq import GPTQ
from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, Unsupported
from tests import reference
from tests.problems import best_codes, in_double, random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=32), GridSpec(4, symmetric=True)]


@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_optimal_brain_quantization_in_a_fixed_order(spec: GridSpec, static_groups: bool) -> None:
    problem = in_double(random_problem())
    expected = reference.gptq(problem, problem.fit_grid(spec), damping=0.01, refit=not static_groups)
    answer = GPTQ(static_groups=static_groups).solve(problem, spec)
    torch.testing.assert_close(answer.weight, expected)


def test_groups_are_refitted_when_they_are_reached_in_act_order_too() -> None:
    """Columns of all groups are then mixed: a group's grid is fitted when the first of its columns comes up."""
    problem = in_double(random_problem(24, 96))
    order = problem.hessian.diagonal().argsort(descending=True, stable=True)
    sorted_problem = problem.permuted(order)
    spec = GridSpec(3, group_size=32)
    expected = reference.gptq(sorted_problem, sorted_problem.fit_grid(spec), damping=0.01, refit=True)
    answer = ActOrder(GPTQ(block_size=40)).solve(problem, spec)
    torch.testing.assert_close(answer.weight[:, order], expected)


def test_it_agrees_in_float32_up_to_ties() -> None:
    problem = random_problem()
    expected = reference.gptq(problem, problem.fit_grid(GridSpec(3)), damping=0.01)
    answer = GPTQ().solve(problem, GridSpec(3))
    assert (answer.weight - expected).abs().gt(1e-4).float().mean() < 0.01
    error = problem.relative_error(expected.float())
    assert abs(problem.relative_error(answer.weight) - error) < 1e-3 * error


@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(2, group_size=32)], ids=str)
def test_it_is_ldlq(spec: GridSpec) -> None:
    """QuIP's theorem 6: without damping, the two give the same weights."""
    problem = in_double(random_problem(24, 96))
    answer = GPTQ(damping=0.0, static_groups=True).solve(problem, spec)
    torch.testing.assert_close(answer.weight, reference.ldlq(problem, problem.fit_grid(spec)))


def test_in_double_precision_it_agrees_to_the_last_code() -> None:
    problem = in_double(random_problem(24, 150))
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

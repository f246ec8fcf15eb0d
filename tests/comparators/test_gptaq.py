"""GPTAQ's own mathematics."""

import pytest
import torch

from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.layer import LayerProblem
from tests.comparators.lossy import gptaq, lossy


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(2, group_size=24), GridSpec(4, symmetric=True)], ids=str)
def test_it_is_the_recursion_on_the_weights_as_they_are(spec: GridSpec, alpha: float) -> None:
    """Although the shared pass knows GPTQ's recursion alone: two triangular solves make up for that."""
    problem = lossy(16, 72).double
    expected = gptaq(problem, problem.fit_grid(spec), alpha, damping=0.01)
    answer = GPTAQ(alpha=alpha, static_groups=True, block_size=20).solve(problem, spec)
    torch.testing.assert_close(answer.weight, expected)


@pytest.mark.parametrize("act_order", [False, True])
def test_groups_are_fitted_when_they_are_reached(act_order: bool) -> None:
    problem, spec = lossy(16, 64, seed=1).double, GridSpec(3, group_size=16)
    order = problem.hessian.diagonal().argsort(descending=True) if act_order else torch.arange(64)
    permuted = problem.permuted(order)
    expected = gptaq(permuted, permuted.fit_grid(spec), alpha=0.5, damping=0.01, order_refit=True)
    solver = ActOrder(GPTAQ(alpha=0.5)) if act_order else GPTAQ(alpha=0.5)
    torch.testing.assert_close(solver.solve(problem, spec).weight[:, order], expected)


def test_in_float32_it_agrees_up_to_ties() -> None:
    layer = lossy()
    expected = gptaq(layer.problem, layer.problem.fit_grid(GridSpec(3)), 0.25, 0.01)
    answer = GPTAQ().solve(layer.problem, GridSpec(3)).weight
    assert (answer - expected).abs().gt(1e-4).float().mean() < 0.02
    assert layer.error(answer) == pytest.approx(layer.error(expected), rel=5e-3)


def test_none_of_the_loss_is_gptq() -> None:
    problem = lossy(16, 64).problem
    for spec in (GridSpec(3), GridSpec(2, group_size=32)):
        assert torch.equal(GPTAQ(alpha=0.0).solve(problem, spec).codes, GPTQ().solve(problem, spec).codes)
        assert not torch.equal(GPTAQ().solve(problem, spec).codes, GPTQ().solve(problem, spec).codes)


def test_damping_is_raised_step_by_step_and_recorded() -> None:
    problem = lossy(8, 32).problem
    shift = torch.linalg.eigvalsh(problem.hessian)[0] + 0.05 * problem.hessian.diagonal().mean()
    indefinite = LayerProblem(problem.weight, problem.hessian - shift * torch.eye(32), cross=problem.cross)
    answer = GPTAQ().solve(indefinite, GridSpec(3))
    assert (answer.damping, answer.notes) == (pytest.approx(0.1), ("damping raised from 0.01 to 0.1",))
    assert GPTAQ().solve(problem, GridSpec(3)).notes == ()


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"damping": -1.0}, {"block_size": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        GPTAQ(**wrong)  # pyright: ignore[reportArgumentType]

"""AWQ's own mathematics."""

from dataclasses import replace

import pytest
import torch

from baselines.awq import AWQ
from baselines.rtn import RTN
from quantease.grid import GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem, Unsupported
from tests.problems import random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=32), GridSpec(4, group_size=32, symmetric=True)]


def scales(problem: LayerProblem) -> list[torch.Tensor]:
    """Section 3.2: s = mean|x|^a for a = 0, 0.05, ..., as the authors normalize it."""
    assert problem.mean_input is not None
    answer = []
    for step in range(20):
        s = problem.mean_input.double() ** (step / 20)
        answer.append((s / (s.max() * s.min()).sqrt()).half().float())
    return answer


def rounded(weight: torch.Tensor, scale: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    grid = UniformGrid.fit(weight * scale, spec)
    return grid.decode(grid.encode(weight * scale)) / scale


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_scale_is_the_best_of_twenty(spec: GridSpec) -> None:
    for seed in range(4):
        problem = random_problem(seed=seed)
        answer = AWQ(clip_steps=0).solve(problem, spec)
        errors = [problem.relative_error(rounded(problem.weight, scale, spec)) for scale in scales(problem)]
        assert problem.relative_error(answer.weight) == pytest.approx(min(errors), rel=1e-4)
        assert answer.column_scale is not None
        torch.testing.assert_close(answer.column_scale, scales(problem)[errors.index(min(errors))])


def test_the_error_is_that_of_the_outputs_for_every_token() -> None:
    """What the search measures through the Hessian is ||(W - W_hat) X||^2 itself."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(300, 64, generator=g) * torch.logspace(0, 1, 64), torch.randn(16, 64, generator=g)
    problem = LayerProblem(weight, x.T @ x, mean_input=x.abs().mean(0))
    answer = AWQ().solve(problem, GridSpec(3, group_size=32)).weight
    direct = ((weight - answer) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert problem.relative_error(answer) == pytest.approx(direct.item(), rel=1e-4)


def test_layers_that_share_an_input_share_the_scale() -> None:
    q, k = random_problem(seed=0), random_problem(seed=1)
    k = replace(q, weight=k.weight)
    together = [replace(q, siblings=(k.weight,)), replace(k, siblings=(q.weight,))]
    first, second = (AWQ().solve(problem, GridSpec(2)).column_scale for problem in together)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    stacked = AWQ().solve(replace(q, weight=torch.cat([q.weight, k.weight])), GridSpec(2)).column_scale
    assert stacked is not None
    assert torch.equal(first, stacked)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clipping_helps_and_never_hurts_a_row(spec: GridSpec) -> None:
    problem = random_problem(seed=3)
    clipped, whole = AWQ().solve(problem, spec).weight, AWQ(clip_steps=0).solve(problem, spec).weight
    errors = [
        ((answer - problem.weight) @ problem.hessian * (answer - problem.weight)).sum(1) for answer in (clipped, whole)
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()
    assert errors[0].sum() < errors[1].sum()


def test_equal_inputs_leave_nothing_to_scale() -> None:
    problem = replace(random_problem(), mean_input=torch.ones(128))
    answer = AWQ(clip_steps=0).solve(problem, GridSpec(3))
    assert torch.equal(answer.weight, RTN().solve(problem, GridSpec(3)).weight)


def test_bits_by_hand() -> None:
    """10 x 128 weights at 3 bits in groups of 32, and one 16-bit scale for each of the 128 columns."""
    answer = AWQ().solve(random_problem(10, 128), GridSpec(3, group_size=32))
    assert answer.bits_per_weight == pytest.approx(3 + (16 + 3) / 32 + 16 / 10)


def test_without_the_inputs_size_it_refuses() -> None:
    with pytest.raises(Unsupported, match="mean of"):
        AWQ().solve(replace(random_problem(), mean_input=None), GridSpec(3))


@pytest.mark.parametrize("wrong", [{"scale_steps": 0}, {"clip_steps": -1}, {"max_shrink": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        AWQ(**wrong)  # pyright: ignore[reportArgumentType]

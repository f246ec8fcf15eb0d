"""LDLQ and greedy passes, as QuIP has them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ, feed_back
from baselines.ldlqrg import LDLQGreedy, damped_hessian, disturbed
from quantease.act_order import ActOrder
from quantease.cholesky import inverse_factor
from quantease.grid import Grid, GridSpec
from quantease.grids.nf4 import NF4
from quantease.layer import LayerProblem, Unsupported
from tests import reference
from tests.problems import in_double, random_problem, with_dead_columns

SPECS = [GridSpec(3), GridSpec(2), GridSpec(2, group_size=32), GridSpec(4, symmetric=True)]


def clamped_passes(problem: LayerProblem, grid: Grid, start: Tensor, passes: int) -> tuple[Tensor, int]:
    """QuIP's greedy passes, a column and an inner product at a time, and how many there were."""
    w, h, q = problem.weight, problem.hessian, start.clone()
    for number in range(passes):
        before = q.clone()
        for i in range(w.shape[1]):
            scale, zero = (table[:, grid.group[i]] for table in (grid.scale, grid.zero))  # pyright: ignore[reportAttributeAccessIssue]
            wanted = q[:, i] - ((q - w) @ h[:, i]) / h[i, i]
            q[:, i] = (torch.round(wanted / scale + zero) - zero) * scale  # in no range
        q = grid.decode(grid.encode(q))
        if torch.equal(q, before):
            return q, number + 1
    return q, passes


def damped_and_sorted(problem: LayerProblem, damping: float = 0.01) -> tuple[LayerProblem, Tensor]:
    hessian = problem.hessian + damping * problem.hessian.diagonal().mean() * torch.eye(len(problem.hessian))
    order = problem.hessian.diagonal().argsort(descending=True, stable=True)
    return replace(problem, hessian=hessian).permuted(order), order


@pytest.mark.parametrize("ldlq", [True, False], ids=["ldlqRG", "allbal"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_algorithm_of_quip(spec: GridSpec, ldlq: bool) -> None:
    problem = in_double(random_problem(12, 64))
    damped, order = damped_and_sorted(problem)
    grid = damped.fit_grid(spec)
    start = reference.ldlq(damped, grid) if ldlq else damped.weight
    expected, _ = clamped_passes(damped, grid, start, 9)
    answer = LDLQGreedy(ldlq=ldlq).solve(problem, spec)
    torch.testing.assert_close(answer.weight[:, order], expected)


def test_the_passes_end_when_one_changes_nothing() -> None:
    problem = in_double(random_problem(12, 64))
    damped, _ = damped_and_sorted(problem)
    grid = damped.fit_grid(GridSpec(4))
    _, count = clamped_passes(damped, grid, reference.ldlq(damped, grid), 100)
    assert count < 50
    answers = [LDLQGreedy(greedy_passes=passes).solve(problem, GridSpec(4)).codes for passes in (count - 1, count, 100)]
    assert torch.equal(answers[1], answers[2])
    assert torch.equal(answers[0], answers[2])  # the last pass found that there was nothing left
    assert not torch.equal(LDLQGreedy(greedy_passes=1).solve(problem, GridSpec(4)).codes, answers[2])


def test_without_passes_it_is_gptq_in_act_order() -> None:
    problem = random_problem()
    for spec in SPECS:
        expected = ActOrder(GPTQ(static_groups=True)).solve(problem, spec)
        answer = LDLQGreedy(greedy_passes=0).solve(problem, spec)
        assert torch.equal(answer.codes, expected.codes)
        plain = LDLQGreedy(greedy_passes=0, act_order=False).solve(problem, spec)
        assert torch.equal(plain.codes, GPTQ(static_groups=True).solve(problem, spec).codes)


def test_noise_is_rounded_but_not_fed_back() -> None:
    """The pass over disturbed weights, against LDLQ with q_k = round(t_k + noise_k) and the errors q_k - t_k."""
    problem = in_double(random_problem(6, 40))
    spec = GridSpec(4)
    grid = problem.fit_grid(spec)
    factor, _ = inverse_factor(problem, 0.01)
    coupling = -factor / factor.diagonal()[:, None]
    noise = 0.3 * torch.randn(40, 6, generator=torch.Generator().manual_seed(1)).double() * grid.scale.mean()
    values = feed_back(disturbed(problem.weight.T, noise, coupling), coupling, grid.columns(), block_size=16)
    t = problem.weight.clone()
    for k in range(40):
        expected = reference.round_column(grid, t[:, k] + noise[k], k)
        torch.testing.assert_close(values[k], expected)
        t[:, k + 1 :] -= (expected - t[:, k])[:, None] * coupling[k, k + 1 :]


def test_random_rounding_is_unbiased() -> None:
    problem = in_double(random_problem(4, 12))
    weight = 0.1 * problem.weight
    weight[:, -2], weight[:, -1] = -4.0, 4.0  # the range: the columns before them stay far from its ends
    problem = replace(problem, weight=weight)
    spec = GridSpec(7, scale_bits=32)
    draws = torch.stack(
        [
            LDLQGreedy(greedy_passes=0, rounding="random", act_order=False, seed=seed).solve(problem, spec).weight
            for seed in range(200)
        ]
    )[:, :, :-2]
    nearest = LDLQGreedy(greedy_passes=0, act_order=False).solve(problem, spec).weight[:, :-2]
    error = draws.std(0) / 200**0.5
    assert (draws.std(0) > 0).all()
    assert ((draws.mean(0) - weight[:, :-2]).abs() < 4.5 * error).all()
    assert ((nearest - weight[:, :-2]).abs() > 4.5 * error).any()


def test_random_rounding_repeats_with_its_seed() -> None:
    problem = random_problem()
    solver = LDLQGreedy(greedy_passes=0, rounding="random")
    assert torch.equal(solver.solve(problem, GridSpec(3)).codes, solver.solve(problem, GridSpec(3)).codes)
    assert not torch.equal(
        solver.solve(problem, GridSpec(3)).codes, replace(solver, seed=1).solve(problem, GridSpec(3)).codes
    )
    assert not solver.rows_independent
    with pytest.raises(Unsupported, match="equal distances"):
        solver.solve(problem, GridSpec(4, group_size=64, format=NF4()))


def test_the_passes_have_gptqs_damping() -> None:
    problem = with_dead_columns(in_double(random_problem(4, 32)), [3, 9])
    hessian = damped_hessian(problem, 0.5)
    factor, damping = inverse_factor(problem, 0.5)
    assert damping == 0.5
    alive = problem.hessian.diagonal() > 0
    torch.testing.assert_close(hessian[alive][:, alive], torch.linalg.inv(factor.T @ factor)[alive][:, alive])
    assert (hessian[~alive].sum(1) == 1).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"damping": -0.1},
        {"greedy_passes": -1},
        {"rounding": "up"},
        {"ldlq": False, "greedy_passes": 0},
        {"rounding": "random"},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|nothing to do|set greedy_passes=0"):
        LDLQGreedy(**wrong)  # pyright: ignore[reportArgumentType]

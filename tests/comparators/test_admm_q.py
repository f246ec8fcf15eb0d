"""ADMM-Q's own mathematics."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.admm_q import ADMMQ, Spectrum, growth
from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease.coordinate_descent import QuantEase
from quantease.grid import Grid, GridSpec
from quantease.layer import LayerProblem, Unsupported
from tests.problems import best_codes, in_double, random_problem, with_dead_columns

SPECS = [GridSpec(3), GridSpec(2, group_size=16), GridSpec(4, symmetric=True)]


def rounds_of(problem: LayerProblem, grid: Grid, rounds: int) -> Tensor:
    """The equations of the method, a row at a time, with a linear system solved in every round."""
    size = problem.hessian.diagonal().sqrt()
    h, eye = problem.hessian / torch.outer(size, size), torch.eye(len(size), dtype=size.dtype)
    answer = torch.empty_like(problem.weight)
    for row in range(len(answer)):
        mine = grid.of_rows(slice(row, row + 1))
        nearest = lambda x, mine=mine: (mine.decode(mine.encode((x / size)[None])) * size)[0]
        w = problem.weight[row] * size
        d, v, r, before = w, torch.zeros_like(w), 0.1, nearest(w)
        for number in range(rounds):
            b = torch.linalg.solve(h + r * eye, h @ w - v + r * d)
            d = nearest(b + v / r)
            v = v + r * (b - d)
            if number and number % 3 == 0:
                changed = float((d != before).float().mean())
                if changed == 0:
                    break
                r *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
                before = d
        answer[row] = d / size
    return answer


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_equations_of_the_method(spec: GridSpec) -> None:
    problem = in_double(random_problem(4, 32))
    grid = problem.fit_grid(spec)
    for rounds in (2, 12, 300):
        answer = ADMMQ(rounds=rounds, sweeps=0).solve(problem, spec)
        assert torch.equal(answer.codes, grid.encode(rounds_of(problem, grid, rounds)))


def test_the_order_of_sums_changes_no_code() -> None:
    """Slices of rows, and columns in another order, are sums in another order in every round.

    In float32 more than 1 % of these codes would change.
    """
    problem = random_problem(64, 256)
    whole = ADMMQ(sweeps=0).solve(problem, GridSpec(3)).codes
    for rows in (slice(0, 1), slice(3, 10)):
        part = replace(problem, weight=problem.weight[rows])
        assert torch.equal(ADMMQ(sweeps=0).solve(part, GridSpec(3)).codes, whole[rows])
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ADMMQ(sweeps=0).solve(problem.permuted(order), GridSpec(3)).codes, whole[:, order])


def test_one_eigendecomposition_gives_the_solution_of_every_penalty() -> None:
    """Also of penalties far below the smallest eigenvalues of an ill-conditioned Hessian."""
    problem = in_double(random_problem(5, 96))
    size = problem.hessian.diagonal().sqrt()
    h = problem.hessian / torch.outer(size, size)
    assert torch.linalg.cond(h) > 1e3
    spectrum = Spectrum.of(h)
    w, d, v = torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(0)).double()
    penalty = torch.tensor([1e-6, 0.01, 0.1, 3.0, 1e4]).double()[:, None]
    found = spectrum.free_copy(spectrum.rotated_product(w), v, d, penalty)
    for row in range(5):
        r = penalty[row, 0]
        expected = torch.linalg.solve(h + r * torch.eye(96), h @ w[row] - v[row] + r * d[row])
        torch.testing.assert_close(found[row], expected, rtol=1e-8, atol=1e-8)


def test_a_penalty_grows_with_the_share_that_changes() -> None:
    shares = torch.tensor([0.0, 0.004, 0.006, 0.09, 0.11, 1.0])
    torch.testing.assert_close(growth(shares), torch.tensor([1.0, 1.1, 1.2, 1.2, 1.3, 1.3]))


def test_descent_goes_on_from_the_answer_of_admm() -> None:
    problem = random_problem(16, 64)
    for spec in SPECS[:2]:
        first, whole = ADMMQ(sweeps=0).solve(problem, spec), ADMMQ().solve(problem, spec)
        assert problem.relative_error(whole.weight) <= problem.relative_error(first.weight)
        again = QuantEase(30, None, init=ADMMQ(sweeps=0)).solve(problem, spec)
        assert torch.equal(whole.codes, again.codes)


def test_it_is_better_than_gptq_on_ill_conditioned_problems() -> None:
    for seed in range(2):
        for spec in (GridSpec(2), GridSpec(4, group_size=32)):
            problem = random_problem(16, 64, seed=seed)
            gptq = problem.relative_error(GPTQ(static_groups=True).solve(problem, spec).weight)
            assert problem.relative_error(ADMMQ().solve(problem, spec).weight) < 0.7 * gptq


def test_never_below_the_optimum_and_often_at_it() -> None:
    at_it = 0
    for seed in range(8):
        problem = random_problem(8, 4, seed=seed)
        answer = ADMMQ().solve(problem, GridSpec(2))
        optimum = problem.relative_error(answer.grid.decode(best_codes(problem, answer.grid)))
        error = problem.relative_error(answer.weight)
        assert error >= optimum * (1 - 1e-5)
        at_it += error < optimum * 1.05
    assert at_it >= 2


def test_dead_columns_are_rounded_without_descent_too() -> None:
    problem = with_dead_columns(random_problem(), [5, 6, 100])
    answer = ADMMQ(sweeps=0).solve(problem, GridSpec(3))
    assert torch.equal(answer.codes[:, [5, 6, 100]], RTN().solve(problem, GridSpec(3)).codes[:, [5, 6, 100]])


def test_a_low_rank_is_damped_and_noted_once() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    answer = ADMMQ().solve(LayerProblem(torch.randn(4, 32), x.T @ x), GridSpec(3))
    assert answer.damping_raised
    assert len(answer.notes) == 1


def test_a_hessian_that_is_not_finite_is_refused() -> None:
    problem = random_problem(4, 8)
    hessian = problem.hessian.clone()
    hessian[0, 1] = hessian[1, 0] = torch.nan
    with pytest.raises(Unsupported, match="is it finite"):
        ADMMQ().solve(replace(problem, hessian=hessian), GridSpec(3))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"penalty": 0.0}, {"sweeps": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        ADMMQ(**wrong)  # pyright: ignore[reportArgumentType]

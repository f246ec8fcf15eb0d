"""QuantEase's own mathematics."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from baselines.awq import AWQ
from baselines.gptq import GPTQ
from baselines.rtn import RTN
from baselines.spqr import SpQR
from quantease import sweeps
from quantease.coordinate_descent import QuantEase, Schedule
from quantease.grid import GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem, LayerSolver, objective
from quantease.outliers import OutlierQuantEase
from quantease.refit import _as_stored, refit
from runners.benchmark.column_by_column import ColumnByColumn
from tests import reference
from tests.problems import best_codes, random_problem, with_dead_columns

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
        assert len(history) <= 12  # fewer where nothing changed any more
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
        monkeypatch.setattr(sweeps, "CPU_BLOCK", block)
        errors.append(problem.relative_error(QuantEase(num_iters=9).solve(problem, GridSpec(3)).weight))
    assert max(errors) <= min(errors) * (1 + 2e-3)


def test_which_sweeps_are_relaxed() -> None:
    """The rule of the authors' code: t % 3 == 1, but not the last and none after 25."""
    schedule = Schedule(num_iters=30, relax_every=3)
    assert [t for t in range(30) if not schedule.rounds(t)] == [1, 4, 7, 10, 13, 16, 19, 22, 25]
    assert Schedule(num_iters=2, relax_every=3).rounds(1)
    assert all(Schedule(30, None).rounds(t) for t in range(30))


@pytest.mark.parametrize("relax_every", [None, 3])
def test_stopping_early_changes_nothing(relax_every: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(16, 48)
    solver = QuantEase(num_iters=60, relax_every=relax_every, track_objective=True)
    early = solver.solve(problem, GridSpec(3))
    monkeypatch.setattr(Schedule, "only_rounds_after", lambda self, iteration: False)
    whole = solver.solve(problem, GridSpec(3))
    assert len(early.history) < len(whole.history) == 60
    assert torch.equal(early.codes, whole.codes)


@pytest.mark.parametrize("init", [AWQ(), SpQR(), SpQR(act_order=False), OutlierQuantEase()], ids=repr)
@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(2, group_size=32)], ids=str)
def test_it_refines_any_method_and_keeps_what_is_beside_its_grid(init: LayerSolver, spec: GridSpec) -> None:
    problem = random_problem(seed=7)
    start = init.solve(problem, spec)
    refined = QuantEase(init=init, relax_every=None).solve(problem, spec)
    assert problem.relative_error(refined.weight) < problem.relative_error(start.weight)
    assert refined.bits_per_weight == start.bits_per_weight
    assert (refined.outliers is None) == (start.outliers is None)


REFIT_SPECS = [
    GridSpec(2),
    GridSpec(3),
    GridSpec(2, group_size=32),
    GridSpec(3, group_size=32),
    GridSpec(3, symmetric=True),
]


@pytest.mark.parametrize("spec", REFIT_SPECS, ids=str)
def test_refitting_the_grid_never_raises_the_objective_and_beats_the_paper(spec: GridSpec) -> None:
    for seed in range(4):
        problem = random_problem(seed=seed)
        plain = QuantEase().solve(problem, spec)
        answer = QuantEase(grid_refits=4, track_objective=True).solve(problem, spec)
        after = answer.history[-4 * 4 - 1 :]  # from the end of the paper's sweeps on
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(after))
        assert problem.relative_error(answer.weight) < problem.relative_error(plain.weight)
        stored = answer.grid.scale.half().float()
        assert torch.equal(stored, answer.grid.scale)
        assert isinstance(answer.grid, UniformGrid)
        assert torch.equal(answer.grid.zero.half().float(), answer.grid.zero)


def test_a_refit_never_raises_the_error_beside_dead_columns_of_a_small_hessian() -> None:
    for spec in (GridSpec(3), GridSpec(3, group_size=16)):
        problem = with_dead_columns(random_problem(48, 64), list(range(0, 64, 8)))
        problem = replace(problem, hessian=problem.hessian * 1e-6)
        plain = QuantEase().solve(problem, spec)
        answer = QuantEase(grid_refits=4, track_objective=True).solve(problem, spec)
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(answer.history[-4 * 4 - 1 :]))
        assert problem.relative_error(answer.weight) < problem.relative_error(plain.weight)


def test_products_of_two_halves_are_those_of_float32_but_for_the_last_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each product of two entries 2^-16 may be lost: the part that `split` leaves over, twice."""
    monkeypatch.setattr(sweeps, "_worth_splitting", lambda _: True)
    for seed in range(3):
        problem = random_problem(16, 64, seed)
        difference = random_problem(16, 64, seed + 10).weight.T
        exact = problem.hessian.double() @ difference.double()
        bound = 2**-15 * problem.hessian.abs().double() @ difference.abs().double()
        error = sweeps.Residual(difference, torch.zeros_like(difference)).hessian_product(problem.hessian) - exact
        assert (error.abs() <= bound).all()
        tf32 = (problem.hessian.double() * (1 + 2**-12)) @ difference.double()  # one part in 4,096, for comparison
        assert error.abs().mean() < 0.1 * (tf32 - exact).abs().mean()


@pytest.mark.parametrize("spread", [1.5, 3.0, 4.5])
def test_the_objective_does_not_suffer_from_products_of_two_halves(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-4 of float32, on inputs whose sizes span up to 4.5 powers of ten."""
    with_halves, without = 0.0, 0.0
    for seed in range(4):
        problem = random_problem(64, 256, seed)
        sizes = torch.logspace(0, -spread, 256)
        problem = replace(problem, hessian=problem.hessian * sizes * sizes[:, None])
        without += problem.relative_error(QuantEase().solve(problem, GridSpec(3)).weight)
        with monkeypatch.context() as patch:
            patch.setattr(sweeps, "_worth_splitting", lambda _: True)
            with_halves += problem.relative_error(QuantEase().solve(problem, GridSpec(3)).weight)
    assert with_halves == pytest.approx(without, rel=1e-4)


def test_a_refitted_scale_and_zero_point_are_the_least_squares_solution() -> None:
    """Against the normal equations of each row, in double precision, for a grid whose parameters are not rounded."""
    problem = random_problem(8, 24)
    grid = problem.fit_grid(GridSpec(2, scale_bits=32))
    codes = grid.encode(problem.weight)
    w_hat = grid.decode(codes).T.contiguous()
    residual = sweeps.Residual(problem.weight.T, w_hat)
    assert isinstance(grid, UniformGrid)
    refitted = refit(w_hat, problem.weight.T, residual, problem.hessian, grid)
    for row in range(8):
        basis = torch.stack([codes[row].double(), torch.ones(24, dtype=torch.float64)], 1)  # scale, -scale * zero
        h = problem.hessian.double()
        best = torch.linalg.solve(basis.T @ h @ basis, basis.T @ h @ problem.weight[row].double())
        assert refitted.scale[row].item() == pytest.approx(best[0].item(), rel=1e-3)
        assert -(refitted.scale * refitted.zero)[row].item() == pytest.approx(best[1].item(), rel=2e-3, abs=1e-3)
    torch.testing.assert_close(w_hat.T, refitted.decode(codes), rtol=1e-4, atol=1e-5)
    expected = problem.hessian @ (problem.weight.T - w_hat)
    torch.testing.assert_close(residual.hessian_product(problem.hessian), expected, rtol=1e-4, atol=1e-2)


def test_fractional_zero_points_are_counted_with_16_bits() -> None:
    """128 columns: 3 bits a code, 16 for the scale, 16 for the zero point."""
    answer = QuantEase(num_iters=2, grid_refits=1).solve(random_problem(8, 128), GridSpec(3))
    assert answer.bits_per_weight == pytest.approx(3 + 32 / 128)
    symmetric = QuantEase(num_iters=2, grid_refits=1).solve(random_problem(8, 128), GridSpec(3, symmetric=True))
    assert symmetric.bits_per_weight == pytest.approx(3 + 16 / 128)


@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(2, group_size=32)])
def test_a_refit_of_scales_alone_stores_no_more_and_is_the_least_squares_solution(spec: GridSpec) -> None:
    problem = random_problem(12, 64)
    plain = GPTQ().solve(problem, spec)
    refitted = QuantEase(0, init=GPTQ(), grid_refits=60, sweeps_per_refit=0, refit_zeros=False).solve(problem, spec)
    assert torch.equal(refitted.codes, plain.codes)
    assert refitted.bits_per_weight == plain.bits_per_weight
    assert isinstance(plain.grid, UniformGrid)
    assert isinstance(refitted.grid, UniformGrid)
    assert torch.equal(refitted.grid.zero, plain.grid.zero)
    for row in range(12):  # the scales of all groups of a row at once, in float64
        centered = (plain.codes[row].double() - plain.grid.zero[row].double()[plain.grid.group])[:, None]
        design = centered * torch.nn.functional.one_hot(plain.grid.group).double()  # (in, groups)
        moment = design.T @ problem.hessian.double()
        best = torch.linalg.solve(moment @ design, moment @ problem.weight[row].double())
        torch.testing.assert_close(refitted.grid.scale[row].double(), best, rtol=5e-3, atol=1e-5)
    assert problem.relative_error(refitted.weight) < problem.relative_error(plain.weight)


@pytest.mark.parametrize("wrong", [{"num_iters": 0}, {"relax_every": 1}, {"grid_refits": -1}, {"sweeps_per_refit": -1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must"):
        QuantEase(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_column_by_column_walk_that_speed_is_measured_against_finds_the_same_codes() -> None:
    problem = random_problem(16, 96)
    walk = ColumnByColumn(problem, UniformGrid.fit(problem.weight, GridSpec(3)))
    for rounds in (True, False, True):
        walk.sweep(rounds)
    answer = QuantEase(num_iters=3).solve(problem, GridSpec(3))
    assert (answer.weight - walk.w_hat).abs().gt(1e-4).float().mean() < 0.02  # ties
    assert problem.relative_error(answer.weight) == pytest.approx(problem.relative_error(walk.w_hat), rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("splits", [False, True])
def test_sweeps_never_wait_for_the_gpu(splits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "_worth_splitting", lambda _: splits)
    problem = random_problem(96, 600)
    hessian, weight = problem.hessian.cuda(), problem.weight.cuda()
    grid = replace(problem, weight=weight, hessian=hessian).fit_grid(GridSpec(3))
    w_hat = weight.T.contiguous()
    residual, convergence = sweeps.Residual(weight.T, w_hat), sweeps.Convergence(w_hat.device)
    sweeps.sweep(w_hat, weight.T, residual, hessian, grid, convergence)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rounds in (True, False, True):
            sweeps.sweep(w_hat, weight.T, residual, hessian, grid if rounds else None, convergence)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = QuantEase(num_iters=4, relax_every=None).solve(problem, GridSpec(3))
    assert problem.relative_error(w_hat.T.cpu()) < 1.5 * problem.relative_error(expected.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_finds_what_the_cpu_finds() -> None:
    problem = random_problem(128, 700, seed=3)
    there = LayerProblem(problem.weight.cuda(), problem.hessian.cuda())
    for solver in (QuantEase(), QuantEase(relax_every=None), GPTQ(), QuantEase(init=GPTQ(), grid_refits=2)):
        for spec in SPECS:
            here = problem.relative_error(solver.solve(problem, replace(spec, group_size=None)).weight)
            gpu = solver.solve(there, replace(spec, group_size=None)).weight.cpu()
            assert problem.relative_error(gpu) == pytest.approx(here, rel=2e-2)


def test_zero_points_that_wander_off_by_many_refits_stay_in_float16() -> None:
    """A zero point of 7,000 that would move by 60,000 more is cut at what float16 holds, not refused."""
    scale, zero = torch.ones(1), torch.full((1,), 7e3)
    change, offset = torch.zeros(1, dtype=torch.float64), torch.full((1,), -6.5e4, dtype=torch.float64)
    new_scale, new_zero = _as_stored(scale, zero, change, offset, 16)
    assert new_scale.item() == 1
    assert torch.isfinite(new_zero.half()).all()
    assert 5.9e4 < new_zero.item() <= 65504

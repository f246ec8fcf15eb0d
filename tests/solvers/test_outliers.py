"""Outlier-aware QuantEase's own mathematics."""

import itertools
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from quantease.coordinate_descent import QuantEase
from quantease.grid import Grid, GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem, objective
from quantease.outliers import SAFETY, OutlierQuantEase, largest_eigenvalue
from tests import reference
from tests.problems import random_problem

SPECS = [GridSpec(3), GridSpec(2), GridSpec(2, group_size=32), GridSpec(4, symmetric=True)]
EITHER = pytest.mark.parametrize("structured", [False, True], ids=["unstructured", "structured"])


@pytest.mark.parametrize("relax_every", [None, 3])
def test_it_is_the_papers_algorithm(relax_every: int | None) -> None:
    problem = random_problem(16, 64)
    problem = replace(problem, weight=problem.weight.double(), hessian=problem.hessian.double())
    solver = OutlierQuantEase(0.02, num_iters=6, relax_every=relax_every)
    spec = GridSpec(3, scale_bits=32)
    count = round(0.02 * 16 * 64)
    grid = problem.fit_grid(spec, problem.weight - reference.largest(problem.weight, count))
    rounded = [relax_every is None or t % 3 != 1 for t in range(6)]
    rate = 1 / (SAFETY * float(largest_eigenvalue(problem.hessian)))
    expected = reference.outlier_quantease(problem, grid, count, rounded, rate)
    torch.testing.assert_close(solver.solve(problem, spec).weight, expected)


@EITHER
@pytest.mark.parametrize("ratio", [0.001, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_number_of_outliers_is_exact(spec: GridSpec, ratio: float, structured: bool) -> None:
    problem = random_problem()
    outliers = OutlierQuantEase(ratio, structured, num_iters=3).solve(problem, spec).outliers
    if structured:
        count = round(ratio * 128)
        assert count == (0 if outliers is None else len(outliers.columns.unique()))
        assert count * 32 == (0 if outliers is None else len(outliers.values))
    else:
        assert round(ratio * 32 * 128) == (0 if outliers is None else len(outliers.values))


@EITHER
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_objective_never_rises_over_pairs_of_an_unrelaxed_sweep_and_a_gradient_step(
    spec: GridSpec, structured: bool
) -> None:
    for seed in range(3):
        solver = OutlierQuantEase(0.05, structured, num_iters=12, relax_every=None, track_objective=True)
        history = solver.solve(random_problem(seed=seed), spec).history
        assert len(history) == 12
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(history))


@EITHER
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_better_than_quantease_on_the_same_bits(spec: GridSpec, structured: bool) -> None:
    for seed in range(4):
        problem = random_problem(seed=seed)
        plain = QuantEase().solve(problem, spec)
        answer = OutlierQuantEase(0.02, structured).solve(problem, spec)
        assert problem.relative_error(answer.weight) < problem.relative_error(plain.weight)


@EITHER
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_without_outliers_it_is_quantease_bit_for_bit(spec: GridSpec, structured: bool) -> None:
    problem = random_problem(seed=2)
    plain, answer = QuantEase().solve(problem, spec), OutlierQuantEase(0.0, structured).solve(problem, spec)
    assert torch.equal(answer.codes, plain.codes)
    assert torch.equal(answer.weight, plain.weight)
    assert answer.bits_per_weight == plain.bits_per_weight


@EITHER
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_with_nothing_but_outliers_the_error_is_zero(spec: GridSpec, structured: bool) -> None:
    problem = random_problem(seed=2)
    problem = replace(problem, weight=problem.weight.half().float())  # as a checkpoint stores it
    assert torch.equal(OutlierQuantEase(1.0, structured).solve(problem, spec).weight, problem.weight)


def test_the_grid_is_fitted_without_the_outliers() -> None:
    problem = random_problem()
    weight = problem.weight.clone()
    weight[3, 7] = 50.0
    problem = replace(problem, weight=weight)
    answer = OutlierQuantEase(0.01).solve(problem, GridSpec(3, group_size=32))
    assert answer.grid.scale[3, 0] < 1.0 < QuantEase().solve(problem, GridSpec(3, group_size=32)).grid.scale[3, 0]
    assert answer.weight[3, 7].item() == pytest.approx(50.0, abs=5.0)


def test_dead_inputs_are_the_last_to_be_kept() -> None:
    problem = random_problem()
    weight, hessian = problem.weight.clone(), problem.hessian.clone()
    weight[:, 5], hessian[5], hessian[:, 5] = 9.0, 0, 0
    outliers = OutlierQuantEase(0.02).solve(replace(problem, weight=weight, hessian=hessian), GridSpec(3)).outliers
    assert outliers is not None
    assert not outliers.columns.eq(5).any()


def test_bits_by_hand() -> None:
    """10 x 128 weights at 3 bits; 1 % are 13 outliers of 32 bits; 2 % of the columns are 3 of 10 x 16 + 16 bits."""
    problem = random_problem(10, 128)
    grid = 3 + (16 + 3) / 128
    unstructured = OutlierQuantEase(0.01, num_iters=2).solve(problem, GridSpec(3))
    assert unstructured.bits_per_weight == pytest.approx(grid + 13 * 32 / 1280)
    structured = OutlierQuantEase(0.02, structured=True, num_iters=2).solve(problem, GridSpec(3))
    assert structured.bits_per_weight == pytest.approx(grid + 3 * (10 * 16 + 16 - 10 * 3) / 1280)


def test_distance_to_the_optimum_over_all_supports_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    """One row of five weights with one outlier at 2 bits: never below the optimum, and how far above it."""
    ratios = []
    for seed in range(40):
        problem = random_problem(1, 5, seed=seed)
        answer = OutlierQuantEase(0.2).solve(problem, GridSpec(2))
        best = best_with_one_outlier(problem, answer.grid)
        found = objective(answer.weight - problem.weight, problem.hessian)
        assert found >= best * (1 - 1e-3) - 1e-6
        ratios.append(found / best)
    median = sorted(ratios)[len(ratios) // 2]
    with capsys.disabled():
        share = sum(ratio < 1.01 for ratio in ratios) / len(ratios)
        print(f"\noutlier-aware QuantEase: {share:.0%} at the optimum, median {median:.2f} times its error")
    assert median < 3


def best_with_one_outlier(problem: LayerProblem, grid: Grid) -> float:
    """The least error over the place of the outlier, its value, and all codes of the others."""
    assert isinstance(grid, UniformGrid)
    h, w = problem.hessian.double(), problem.weight[0].double()
    codes = torch.tensor(list(itertools.product(range(4), repeat=4)))
    errors: list[Tensor] = []
    for place in range(5):
        others = torch.arange(5) != place
        schur = h[others][:, others] - torch.outer(h[others, place], h[others, place]) / h[place, place]
        difference = grid.scale[0, 0].double() * (codes - grid.zero[0, 0]) - w[others]
        errors.append((difference @ schur * difference).sum(1).min())
    return float(min(errors))


@pytest.mark.parametrize("size", [3, 50, 400])
def test_the_largest_eigenvalue_is_found_within_the_safety(size: int) -> None:
    hessian = random_problem(1, size).hessian
    exact = torch.linalg.eigvalsh(hessian.double())[-1].item()
    assert exact / SAFETY <= largest_eigenvalue(hessian) <= exact * 1.0001


@pytest.mark.parametrize("wrong", [{"outlier_ratio": -0.1}, {"outlier_ratio": 1.1}, {"num_iters": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        OutlierQuantEase(**wrong)  # pyright: ignore[reportArgumentType]

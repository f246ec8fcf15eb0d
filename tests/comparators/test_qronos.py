"""Qronos's own mathematics."""

from dataclasses import replace

import pytest
import torch

from baselines.gptq import GPTQ
from baselines.qronos import Qronos
from baselines.rtn import RTN
from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.layer import LayerSolver
from quantease.outliers import largest_eigenvalue
from tests.comparators.lossy import lossy, qronos
from tests.problems import random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=24), GridSpec(4, symmetric=True)]


@pytest.mark.parametrize("damping", [1e-6, 1e-3])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_is_the_papers_two_steps_and_then_diffusion(spec: GridSpec, damping: float) -> None:
    problem = lossy(16, 72).double
    order = problem.hessian.diagonal().argsort(descending=True)
    permuted = problem.permuted(order)
    exact = torch.linalg.eigvalsh(problem.hessian)[-1] / largest_eigenvalue(problem.hessian)  # of the power iteration
    expected = qronos(permuted, permuted.fit_grid(spec), damping / exact.item())
    answer = Qronos(damping, block_size=20).solve(problem, spec).weight[:, order]
    torch.testing.assert_close(answer, expected)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_where_nothing_was_lost_it_is_gptq_in_act_order(spec: GridSpec) -> None:
    problem = lossy(16, 72, noise=0.0).double
    problem = replace(problem, cross=torch.zeros(72, 72, dtype=torch.float64))
    answer = Qronos(1e-4).solve(problem, spec)
    assert answer.damping is not None
    expected = ActOrder(GPTQ(damping=answer.damping, static_groups=True)).solve(problem, spec)
    assert torch.equal(answer.codes, expected.codes)


def test_the_first_column_is_the_one_that_corrects_for_itself() -> None:
    """Of a layer with one input, all that can be done is to scale its weight."""
    layer = lossy(32, 1, noise=0.5)
    scale = (layer.full * layer.left).sum() / layer.left.square().sum()
    answer = Qronos().solve(layer.problem, GridSpec(8))
    assert torch.equal(answer.codes, answer.grid.encode(layer.weight * scale))


def test_its_published_damping_is_little_for_ill_conditioned_layers() -> None:
    """Also without a cross moment: GPTQ with so little, in act-order, ends above rounding to nearest; 1e-3 suits both."""

    def error(solver: LayerSolver) -> float:
        problems = [random_problem(seed=seed) for seed in range(3)]
        return sum(problem.relative_error(solver.solve(problem, GridSpec(3)).weight) for problem in problems)

    assert error(ActOrder(GPTQ(damping=1e-5))) > error(RTN())
    assert error(Qronos()) > error(RTN())
    assert error(Qronos(1e-3)) < 0.5 * error(RTN())


def test_damping_is_raised_and_recorded() -> None:
    layer = lossy(8, 64, tokens=16)
    answer = Qronos(damping=0.0).solve(layer.problem, GridSpec(3))
    assert answer.damping_raised
    assert answer.notes == (f"damping raised from 0 to {answer.damping:g}",)
    assert Qronos().solve(lossy(8, 64).problem, GridSpec(3)).notes == ()


@pytest.mark.parametrize("wrong", [{"damping": -1.0}, {"block_size": 0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Qronos(**wrong)  # pyright: ignore[reportArgumentType]

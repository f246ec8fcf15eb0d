"""Transforms, and act-order inside groups: what they do to a layer is undone in the answer."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from baselines.transforms.incoherence import Incoherence
from baselines.transforms.magr import MagR, on_l1_ball
from quantease.act_order import ActOrder
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.grids.rotation import Rotation
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from quantease.outliers import OutlierQuantEase
from quantease.transform import Transformed
from runners.config.command_line import check
from runners.errors import InputError
from runners.quantization.packing import pack, unpack
from runners.results.metrics import grid_words
from runners.run.experiment import run_cell
from tests.conftest import ToySettings
from tests.problems import random_problem, with_dead_columns

SIZES = [1, 2, 3, 8, 12, 64, 96, 71, 568]  # powers of two, others, and odd ones; Falcon-7B's 4,544 is 8 times 568


@dataclass(frozen=True)
class Keeps(LayerSolver):
    """A method that keeps the problems that it is given."""

    solver: LayerSolver
    problems: list[LayerProblem] = field(default_factory=list)

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.problems.append(problem)
        return self.solver.solve(problem, spec)


def rotation(columns: int, seed: int = 5) -> Rotation:
    generator = torch.Generator().manual_seed(seed)
    return Rotation(seed, torch.rand(columns, generator=generator).half().float() + 0.5)


@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_undone(size: int) -> None:
    basis = rotation(size)
    both = basis.of_inputs(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(both @ both.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    weight = torch.randn(24, size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(basis.undo(basis.of_weight(weight)), weight, rtol=1e-4, atol=1e-5)
    # No entry of V is much larger than 1 / sqrt(n): twice for each factor that is no Hadamard matrix.
    assert both.abs().max() <= (2 / size) ** 0.5 + 1e-9 or size == 1


def test_the_objective_is_the_same_in_both_bases() -> None:
    problem = random_problem(24, 96)
    basis = rotation(96)
    difference = torch.randn(24, 96, generator=torch.Generator().manual_seed(2)).double()
    here = (difference @ problem.hessian.double() * difference).sum()
    double = Rotation(basis.seed, basis.scale.double())
    turned = double.of_weight(difference)
    there = (turned @ double.of_moment(problem.hessian.double()) * turned).sum()
    torch.testing.assert_close(here, there, rtol=1e-9, atol=0)


@pytest.mark.parametrize("inner", [RTN(), GPTQ(), ActOrder(QuantEase(num_iters=4)), OutlierQuantEase(num_iters=4)])
@pytest.mark.parametrize("size", [64, 96])
def test_behind_incoherence_a_method_answers_in_the_rotated_basis(inner: LayerSolver, size: int) -> None:
    problem = with_dead_columns(random_problem(32, size), [3])
    keeps = Keeps(inner)
    answer = Transformed(Incoherence(), keeps).solve(problem, GridSpec(3, group_size=32))
    alone = inner.solve(keeps.problems[0], GridSpec(3, group_size=32))
    assert answer.rotation is not None
    assert torch.equal(answer.weight, answer.rotation.undo(alone.weight))
    bits = alone.bits_per_weight + (32 + 16 * size) / problem.weight.numel()
    assert answer.bits_per_weight == pytest.approx(bits)
    # The scales balance the two sides: diag H / s^2 and diag W^T W s^2 are equal up to a factor of the layer.
    scale, alive = answer.rotation.scale, problem.hessian.diagonal() > 0
    sides = problem.hessian.diagonal() / scale**2 / (problem.weight.square().sum(0) * scale**2)
    assert sides[alive].max() / sides[alive].min() < 1.01
    (again,) = unpack(*pack({"layer": answer})).values()
    assert torch.equal(again.weight, answer.weight)
    with pytest.raises(ValueError, match="rotate first"):
        answer.permuted(torch.arange(size))
    with pytest.raises(ValueError, match="cannot be divided"):
        answer.select_rows(slice(0, 4))


def test_incoherence_flattens_a_weight_with_outliers() -> None:
    problem = random_problem(64, 128)
    weight = problem.weight.clone()
    weight[::16, ::32] *= 30
    problem = replace(problem, weight=weight)
    spec = GridSpec(3)
    plain, turned = (
        problem.relative_error(solver.solve(problem, spec).weight)
        for solver in (GPTQ(), Transformed(Incoherence(), GPTQ()))
    )
    assert turned < 0.5 * plain


def test_methods_that_need_the_size_of_each_input_are_unsupported_behind_incoherence() -> None:
    (settings,) = check(["method=awq", "transform=incoherence"], multirun=False)
    with pytest.raises(Unsupported, match="rotation mixes"):
        settings.run.solver.solve(random_problem(), GridSpec(3))


def shrunk_slowly(problem: LayerProblem, steps: int, penalty: float) -> Tensor:
    """MagR row by row in float64; the projection by bisection of its threshold."""
    hessian = problem.hessian.double() / torch.linalg.eigvalsh(problem.hessian.double())[-1]
    rows = []
    for original in problem.weight.double():
        w = original
        for _ in range(steps):
            v = w - (w - original) @ hessian
            low, high = 0.0, float(v.abs().max()) / penalty
            for _ in range(80):
                middle = (low + high) / 2
                too_large = (v.abs() / penalty - middle).clamp(min=0).sum() > 1
                low, high = (middle, high) if too_large else (low, middle)
            projected = v.sign() * (v.abs() / penalty - high).clamp(min=0)
            w = v - penalty * (v / penalty if (v.abs() / penalty).sum() <= 1 else projected)
        rows.append(w)
    return torch.stack(rows)


@pytest.mark.parametrize("group_size", [None, 16])
def test_magr_is_its_equations(group_size: int | None) -> None:
    problem = random_problem(6, 32)
    keeps = Keeps(RTN())
    MagR(steps=40, penalty=0.01, group_penalty=0.01).solve(keeps, problem, GridSpec(3, group_size=group_size))
    if group_size is None:
        torch.testing.assert_close(
            keeps.problems[0].weight.double(), shrunk_slowly(problem, 40, 0.01), rtol=1e-3, atol=1e-4
        )
    width = group_size or 32
    before, after = (weight.view(-1, width).abs().amax(-1) for weight in (problem.weight, keeps.problems[0].weight))
    assert (after < before).float().mean() > 0.9
    assert problem.relative_error(keeps.problems[0].weight) < 1e-3


def test_the_projection_is_the_nearest_point_of_the_ball() -> None:
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows *= torch.logspace(-2, 1, 50)[:, None]
    nearest = on_l1_ball(rows)
    inside = rows.abs().sum(-1) <= 1
    assert torch.equal(nearest[inside], rows[inside])
    torch.testing.assert_close(nearest[~inside].abs().sum(-1), torch.ones(int((~inside).sum()), dtype=torch.float64))
    # Optimality: what was taken away is the same for all entries that are left, and at least the size of the others.
    taken = (rows - nearest).abs()[~inside]
    left = nearest[~inside] != 0
    threshold = taken.where(left, 0.0).amax(-1, keepdim=True)
    torch.testing.assert_close(taken[left], threshold.expand_as(taken)[left])
    assert (taken[~left] <= threshold.expand_as(taken)[~left] + 1e-12).all()


def test_magr_leaves_dead_inputs_as_they_are_and_rows_alone() -> None:
    problem = with_dead_columns(random_problem(12, 32), [4, 9])
    solver = Transformed(MagR(), GPTQ())
    assert solver.rows_independent
    assert not Transformed(Incoherence(), GPTQ()).rows_independent
    whole = solver.solve(problem, GridSpec(3)).weight
    part = solver.solve(replace(problem, weight=problem.weight[3:7]), GridSpec(3)).weight
    torch.testing.assert_close(whole[3:7], part)
    keeps = Keeps(RTN())
    MagR().solve(keeps, problem, GridSpec(3))
    assert torch.equal(keeps.problems[0].weight[:, [4, 9]], problem.weight[:, [4, 9]])


def test_act_order_within_groups_keeps_the_columns_of_a_group_together() -> None:
    problem = random_problem(16, 64)
    keeps = Keeps(GPTQ())
    answer = ActOrder(keeps, within_groups=True).solve(problem, GridSpec(3, group_size=16))
    assert keeps.problems[0].order is not None
    groups = (keeps.problems[0].order // 16).view(4, 16)
    assert (groups == groups[:, :1]).all()
    energy = keeps.problems[0].hessian.diagonal().view(4, 16)
    assert (energy.diff(dim=1) <= 0).all()
    assert (energy[:, 0].diff() <= 0).all()
    assert torch.equal(answer.grid.group, torch.arange(64) // 16)  # back in place


@pytest.mark.parametrize(
    "words", [("transform=magr",), ("transform=incoherence",), ("act_order=groups", "group_size=8")]
)
def test_a_run_says_what_was_done_to_its_layers(words: tuple[str, ...], toy_settings: ToySettings) -> None:
    settings = toy_settings("method=gptq", "bits=3", *words)
    row = run_cell(settings)
    assert settings.digest != toy_settings("method=gptq", "bits=3", *words[1:]).digest
    said = {"transform": row.get("transform"), "column_order": row.get("column_order")}
    expected = {"transform": words[0].partition("=")[2], "column_order": None}
    assert said == (
        expected if words[0].startswith("transform") else {"transform": None, "column_order": "within groups"}
    )
    assert grid_words(row).endswith(expected["transform"] if said["transform"] else "act-order within groups")


def test_an_unknown_order_or_an_order_without_groups_is_refused() -> None:
    with pytest.raises(InputError, match="act_order must be false, true or groups, not 'sorted'"):
        check(["act_order=sorted"], multirun=False)
    with pytest.raises(InputError, match="take act_order=true"):
        check(["act_order=groups"], multirun=False)
    with pytest.raises(InputError, match="transform=magr goes by the inputs"):
        check(["method=rtn", "transform=magr", "calibration=none"], multirun=False)

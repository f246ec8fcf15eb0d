"""Layers of unusual scale: every method gives c W the answer of W times c, for any power of two c."""

from dataclasses import replace

import pytest
import torch

from baselines.rtn import RTN
from baselines.spqr import SpQR
from baselines.spqr_groups import quantize_statistics
from quantease.act_order import ActOrder
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, join_rows
from quantease.normal_scale import unusual_exponent
from runners.quantization.packing import pack, unpack
from tests.problems import random_problem
from tests.solvers.test_every_method import METHODS, build_solver


def times(problem: LayerProblem, factor: float) -> LayerProblem:
    return replace(problem, weight=problem.weight * factor)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_power_of_two_changes_nothing_but_the_scale(name: str, act_order: bool) -> None:
    if name == "quantease_best":
        pytest.skip("MagR's penalty is a weight, as published: layers of usual scale are not shrunk in proportion")
    problem = random_problem(16, 32)
    solver = ActOrder(build_solver(name)) if act_order else build_solver(name)
    for spec in (GridSpec(3), GridSpec(2, group_size=16)):
        answer = solver.solve(problem, spec)
        assert answer.exponent == 0
        for exponent in (-30, -17, -5, 5, 30):
            scaled = solver.solve(times(problem, 2.0**exponent), spec)
            assert torch.equal(scaled.codes, answer.codes)
            assert torch.equal(scaled.weight, answer.weight * 2.0**exponent)
            assert scaled.outlier_ratio == answer.outlier_ratio


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_of_any_scale_is_as_good_as_another(name: str) -> None:
    problem = random_problem(16, 32)
    error = problem.relative_error(build_solver(name).solve(problem, GridSpec(3)).weight)
    for factor in (1e-9, 1e-5, 1e5, 1e9):
        scaled = times(problem, factor)
        answer = build_solver(name).solve(scaled, GridSpec(3))
        assert scaled.relative_error(answer.weight) == pytest.approx(error, rel=0.25)


def test_the_exponent_is_counted_and_packed_only_where_there_is_one() -> None:
    problem = random_problem(16, 32)
    usual, unusual = (RTN().solve(times(problem, factor), GridSpec(3)) for factor in (1.0, 2.0**-20))
    assert unusual.bits_per_weight == usual.bits_per_weight + 8 / (16 * 32)
    for layer in (usual, unusual):
        tensors, metadata = pack({"fc1": layer})
        assert ("exponent" in metadata["layers"]) == (layer is unusual)
        assert torch.equal(unpack(tensors, metadata)["fc1"].weight, layer.weight)


def test_slices_of_different_scales_are_joined_exactly() -> None:
    problem = random_problem(16, 32)
    parts = [RTN().solve(times(problem, factor), GridSpec(3)) for factor in (1.0, 2.0**-20, 2.0**20)]
    assert len({part.exponent for part in parts}) == 3
    assert torch.equal(join_rows(parts).weight, torch.cat([part.weight for part in parts]))


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_weights_without_a_scale_are_left_to_the_method(value: float) -> None:
    weight = torch.full((2, 8), value)
    assert unusual_exponent(weight) == 0


def test_scales_that_lose_bits_are_counted() -> None:
    problem = random_problem(16, 32)
    problem.weight[3] *= 1e-6  # one row of a layer of usual scale
    assert RTN().solve(problem, GridSpec(3)).grid.coarse_scales == 1
    assert RTN().solve(problem, GridSpec(3, scale_bits=32)).grid.coarse_scales == 0


def test_the_second_level_of_spqr_has_the_bits_of_scales() -> None:
    values = torch.rand(32, generator=torch.Generator().manual_seed(0)) * 1e-6
    exact = quantize_statistics(values, 8, 16, 32)
    assert (exact - values).abs().max() < 1e-6 / 255
    assert (quantize_statistics(values, 8, 16) - values).abs().max() > 10 * (exact - values).abs().max()
    problem = random_problem(32, 64)
    solver = SpQR(outlier_ratio=0.0, act_order=False)
    half, full = (solver.solve(problem, GridSpec(3, scale_bits=bits)) for bits in (16, 32))
    assert full.bits_per_weight - half.bits_per_weight == 64 / (16 * 16)

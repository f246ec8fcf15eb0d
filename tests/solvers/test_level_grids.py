"""Grids of levels: NF4, MXFP4 and NVFP4, held to other people's (golden/make_levels.py) and to brute force."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from baselines.spqr import SpQR
from quantease import kernels
from quantease.act_order import ActOrder
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.grids.formats import FORMATS
from quantease.grids.levels import LevelGrid
from quantease.grids.mxfp4 import MXFP4
from quantease.grids.nf4 import NF4
from quantease.grids.nvfp4 import NVFP4
from quantease.kernels import plain
from quantease.kernels.plain import round_column
from quantease.layer import Unsupported, join_rows
from tests.problems import best_codes, random_problem

GOLDEN = load_file(Path(__file__).parent / "golden" / "levels.safetensors")
SPECS = {
    "nf4": GridSpec(4, group_size=64, format=NF4()),
    "mxfp4": GridSpec(4, group_size=32, format=MXFP4()),
    "nvfp4": GridSpec(4, group_size=16, format=NVFP4()),
}


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> GridSpec:
    return SPECS[request.param]


def fitted(spec: GridSpec, weight: Tensor) -> LevelGrid:
    grid = spec.fit(weight)
    assert isinstance(grid, LevelGrid)
    return grid


def test_nf4_is_that_of_bitsandbytes() -> None:
    """In every code and scale; it keeps them in float32."""
    grid = replace(SPECS["nf4"], scale_bits=32).fit(GOLDEN["weight"])
    assert torch.equal(grid.scale, GOLDEN["nf4.scale"])
    assert torch.equal(grid.encode(GOLDEN["weight"]), GOLDEN["nf4.codes"])


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_the_4_bit_floats_are_those_of_torchao_and_compressed_tensors(name: str) -> None:
    """In every scale, byte by byte, and every value; ties are among them."""
    grid = SPECS[name].fit(GOLDEN["weight"])
    stored = grid.to_tensors()
    assert torch.equal(stored["scale"], GOLDEN[f"{name}.scale"])
    values = grid.decode(grid.encode(GOLDEN["weight"]))
    assert torch.equal(values + 0.0, GOLDEN[f"{name}.values"] + 0.0)  # no minus zero
    if name == "nvfp4":
        assert torch.equal(stored["tensor_scale"], GOLDEN["nvfp4.tensor_scale"])


def test_the_level_is_the_nearest_one(spec: GridSpec) -> None:
    """By brute force; at a middle either neighbor is."""
    weight = torch.cat([GOLDEN["weight"], 3 * torch.randn(5, 128, generator=torch.Generator().manual_seed(1))])
    grid = fitted(spec, GOLDEN["weight"]).of_rows(slice(0, 5))
    for rows in (weight[:5], weight[-5:]):
        points = torch.stack([grid.decode(torch.full((5, 128), code)) for code in range(spec.max_code + 1)]).double()
        least = (points - rows).abs().amin(0)
        chosen = (grid.decode(grid.encode(rows)) - rows).double().abs()
        assert torch.allclose(chosen, least, rtol=1e-6, atol=0)


def test_ties_are_defined() -> None:
    """Those of 4-bit floats go to the even mantissa, those of NF4 down."""
    scaled = torch.zeros(1, 32)
    scaled[0, :15] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, 4])
    grid = SPECS["mxfp4"].fit(scaled)
    assert grid.scale.item() == 1
    expected = [0, 1, 1, 2, 2, 4, 4, 0, -1, -1, -2, -2, -4, -4, 4]
    assert grid.decode(grid.encode(scaled))[0, :15].tolist() == expected
    levels = NF4().levels
    middles = torch.cat([(levels[1:] + levels[:-1]) / 2, torch.ones(1)])
    codes = replace(SPECS["nf4"], group_size=16, scale_bits=32).fit(middles[None]).encode(middles[None])
    assert codes[0].tolist() == list(range(16))


def test_mxfp4_cuts_what_is_beyond_its_largest_level() -> None:
    """The specification's scale is a power of two not above a quarter of the largest weight: 7.9 becomes 6."""
    weight = torch.zeros(1, 32)
    for largest, scale in [(7.9, 1.0), (8.0, 2.0), (4.0, 1.0), (3.9, 0.5), (2.0**-120, 2.0**-122), (1e-38, 2.0**-126)]:
        weight[0, 3] = largest
        grid = SPECS["mxfp4"].fit(weight)
        assert grid.scale.item() == scale
    weight[0, 3] = 7.9
    grid = SPECS["mxfp4"].fit(weight)
    assert grid.decode(grid.encode(weight))[0, 3] == 6


def test_zero_is_a_value_and_zeros_stay(spec: GridSpec) -> None:
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1, :64] = 0, 0
    grid = spec.fit(weight)
    values = grid.decode(grid.encode(weight))
    assert values[weight == 0].eq(0).all()
    assert grid.scale.gt(0).all()
    assert torch.isfinite(values).all()
    zeros = spec.fit(torch.zeros(2, 64))
    assert zeros.decode(zeros.encode(torch.zeros(2, 64))).eq(0).all()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_refused(spec: GridSpec, value: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        spec.fit(weight)


def test_bits_by_hand() -> None:
    weight = torch.randn(10, 128)
    assert SPECS["nf4"].fit(weight).bits_per_weight == 4 + 16 / 64
    assert replace(SPECS["nf4"], scale_bits=32, group_size=None).fit(weight).bits_per_weight == 4 + 32 / 128
    assert SPECS["mxfp4"].fit(weight).bits_per_weight == 4 + 8 / 32
    assert SPECS["nvfp4"].fit(weight).bits_per_weight == 4 + 8 / 16 + 32 / 1280


def test_what_is_stored_comes_back_to_the_bit(spec: GridSpec) -> None:
    weight = random_problem().weight * torch.logspace(-6, 1, 32)[:, None]
    grid = fitted(spec, weight)
    again = LevelGrid.from_tensors(grid.to_tensors(), spec, grid.format)
    assert torch.equal(again.scale, grid.scale)
    assert torch.equal(again.group, grid.group)
    assert torch.equal(again.decode(grid.encode(weight)), grid.decode(grid.encode(weight)))
    assert grid.to_tensors()["scale"].element_size() * 8 in (spec.scale_format.bits, 32)


def test_rounding_a_column_is_encoding_it(spec: GridSpec) -> None:
    weight = random_problem().weight
    grid, values = spec.fit(weight), 2 * weight.roll(1, 0)
    columns, expected = grid.columns()[64:128], grid.decode(grid.encode(values))
    for column in range(64):
        rounded = round_column(values[:, 64 + column], columns, column)
        assert torch.equal(rounded, expected[:, 64 + column])


def test_the_compiled_form_is_the_plain_one_to_the_bit(spec: GridSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a diagonal Hessian, whose sums have one term: only the rounding itself is left."""
    problem = random_problem()
    problem = replace(problem, hessian=problem.hessian.diagonal().diag())
    answers = []
    for run in (kernels._form(problem.weight), plain.run_block):
        monkeypatch.setattr(kernels, "_form", lambda _values, run=run: run)
        answers.append(QuantEase(3, relax_every=None).solve(problem, spec).weight)
    assert torch.equal(*answers)


def test_the_error_never_rises_without_relaxed_sweeps(spec: GridSpec) -> None:
    for seed in range(3):
        problem = random_problem(seed=seed)
        history = QuantEase(12, relax_every=None, track_objective=True).solve(problem, spec).history
        assert len(history) > 2
        assert all(later <= earlier * (1 + 1e-5) for earlier, later in itertools.pairwise(history))


@pytest.mark.parametrize("kind", [NF4, MXFP4])
def test_descent_ends_near_the_optimum(kind: Callable[[], NF4 | MXFP4]) -> None:
    """All codes of the first columns are tried; the others see no input."""
    problem = random_problem(2, 32, seed=6)
    spec = GridSpec(4, group_size=32, format=kind())
    grid = problem.fit_grid(spec)
    hessian = torch.zeros_like(problem.hessian)
    hessian[:4, :4] = problem.hessian[:4, :4]
    problem = replace(problem, hessian=hessian)
    small = replace(problem, weight=problem.weight[:, :4], hessian=hessian[:4, :4], mean_input=None)
    best = grid.permuted(torch.arange(4)).decode(best_codes(small, grid.permuted(torch.arange(4))))
    optimum = small.relative_error(best)
    answer = problem.relative_error(QuantEase(30).solve(problem, spec).weight)
    rounded = problem.relative_error(RTN().solve(problem, spec).weight)
    assert optimum * (1 - 1e-4) <= answer <= max(2 * optimum, rounded)


def test_descent_beats_gptq_and_rounding(spec: GridSpec) -> None:
    gains = []
    for seed in range(3):
        problem = random_problem(seed=seed)
        rtn, gptq, quantease = (
            problem.relative_error(solver.solve(problem, spec).weight)
            for solver in (RTN(), GPTQ(static_groups=True), QuantEase(30))
        )
        assert quantease < rtn
        gains.append(quantease / gptq)
    assert sum(gains) / 3 < 1


def test_rows_may_be_solved_apart_unless_they_share_a_scale() -> None:
    problem = random_problem(seed=2)
    for name in ("nf4", "mxfp4"):
        assert SPECS[name].rows_independent
        parts = [replace(problem, weight=problem.weight[:10] * 2.0**-20), replace(problem, weight=problem.weight[10:])]
        joined = join_rows([RTN().solve(part, SPECS[name]) for part in parts])
        whole = torch.cat([RTN().solve(part, SPECS[name]).weight for part in parts])
        assert torch.equal(joined.weight, whole)
    assert not SPECS["nvfp4"].rows_independent
    part = RTN().solve(problem, SPECS["nvfp4"])
    with pytest.raises(ValueError, match="one scale of its own"):
        join_rows([part, part])


def test_act_order_keeps_the_scales_of_the_layer(spec: GridSpec) -> None:
    problem = random_problem(seed=3)
    assert torch.equal(ActOrder(RTN()).solve(problem, spec).weight, RTN().solve(problem, spec).weight)


def test_other_precisions_give_the_same_codes(spec: GridSpec) -> None:
    weight = random_problem().weight
    assert torch.equal(spec.fit(weight.double()).encode(weight.double()), spec.fit(weight).encode(weight))


def test_what_a_method_cannot_do_it_says(spec: GridSpec) -> None:
    with pytest.raises(Unsupported, match="grid=int"):
        SpQR().solve(random_problem(), spec)
    with pytest.raises(Unsupported, match="grid_refits=0"):
        QuantEase(1, grid_refits=1).solve(random_problem(), spec)


@pytest.mark.parametrize("name", FORMATS)
def test_requests_that_contradict_the_format_are_refused(name: str) -> None:
    good = SPECS[name]
    for changes, words in [
        ({"bits": 3}, "codes of 4 bits"),
        ({"symmetric": True}, "no zero points"),
        ({"range": "mse"}, "grid_range=minmax"),
    ]:
        with pytest.raises(ValueError, match=words):
            replace(good, **changes)
    if name != "nf4":
        for changes, words in [({"group_size": 64}, "groups of"), ({"scale_bits": 32}, "scales of 8 bits")]:
            with pytest.raises(ValueError, match=words):
                replace(good, **changes)

"""Layers that calibration reaches too little: rounded to nearest, left alone or refused, and marked either way."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from baselines.rtn import RTN
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from runners.errors import InputError
from runners.models.blocks import InMemoryModel, decoder_blocks
from runners.quantization.fallback import RoundToNearest, why_not_calibrated
from runners.quantization.input_statistics import InputStatistics
from runners.results.layers import LayerRecord, refuse_warnings, summarize_layers
from tests.conftest import ToySettings
from tests.families import random_ids, random_model
from tests.quantize import quantize

SPEC = GridSpec(3)
TOKENS = 6 * 24


class Routed(nn.Module):
    """Hands the first `count` tokens of every batch to a layer that adds nothing to them."""

    def __init__(self, own: nn.Module, count: int) -> None:
        super().__init__()
        self.own, self.rare, self.count = own, nn.Linear(32, 8), count

    def forward(self, hidden: Tensor) -> Tensor:
        if self.count:
            self.rare(hidden.flatten(0, -2)[: self.count])
        return self.own(hidden)


@dataclass(frozen=True)
class Seen(LayerSolver):
    """Rounds to nearest and notes the shapes that it was given."""

    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.shapes.append(tuple(problem.weight.shape))
        return RTN().solve(problem, spec)


def run(count: int, fallback: str, solver: LayerSolver | None = None) -> tuple[Any, dict[str, LayerRecord]]:
    """A model with a layer that `count` tokens of each batch reach, and the records of the block that has it."""
    model = random_model("opt")
    block: Any = decoder_blocks(model)[1]
    block.fc1 = Routed(block.fc1, count)
    model.requires_grad_(False)
    options: dict[str, Any] = {"stored_bits": 32.0, "fallback": fallback}
    records = quantize(InMemoryModel(model), random_ids(6), 3, solver or QuantEase(), SPEC, **options)
    return model, {record.layer: record for record in records if record.block == 1}


def rare_weight(model: Any) -> Tensor:
    block: Any = decoder_blocks(model)[1]
    return block.fc1.rare.weight


def test_an_expert_with_too_few_tokens_is_rounded_and_its_error_on_them_counts() -> None:
    model = random_model("opt")
    block: Any = decoder_blocks(model)[1]
    block.fc1 = Routed(block.fc1, 1)
    model.requires_grad_(False)
    before = rare_weight(model).clone()
    solver = Seen()
    records = quantize(InMemoryModel(model), random_ids(1), 3, solver, SPEC, stored_bits=32.0)
    (rare,) = (record for record in records if record.layer == "fc1.rare")
    assert (rare.fallback, rare.tokens, rare.left_alone) == (True, 1, False)
    assert rare.notes == "rounded to nearest, as only 1 of 24 calibration tokens have reached its 32 inputs"
    assert (8, 32) not in solver.shapes
    problem = LayerProblem(before, torch.eye(32))
    assert torch.equal(rare_weight(model), RTN().solve(problem, SPEC).weight)
    assert 0 < (rare.relative_error or 0) < 1


def test_enough_tokens_are_for_the_method() -> None:
    _, records = run(1, "rtn", solver := Seen())
    assert (records["fc1.rare"].fallback, records["fc1.rare"].tokens) == (False, 2)
    assert (8, 32) in solver.shapes
    assert records["fc1.own"].tokens == TOKENS


def test_what_no_token_reaches_has_no_error_and_counts_in_the_bits() -> None:
    model, records = run(0, "rtn")
    rare = records["fc1.rare"]
    assert (rare.relative_error, rare.held_out_error, rare.tokens) == (None, None, 0)
    assert rare.notes == "rounded to nearest, as no calibration token has reached it"
    figures = summarize_layers(list(records.values()), 10**6, 32)
    assert (figures["warnings/fallback"], figures["warnings/left_alone"]) == (1, 0)
    assert figures["bits_per_weight"] < 4
    assert all(len(row.unique()) <= 8 for row in rare_weight(model))
    with pytest.raises(InputError, match=r"fc1\.rare in block 1: fallback: True \(rounded to nearest"):
        refuse_warnings(rare)


def test_it_is_rounded_on_its_own_grid() -> None:
    model = random_model("opt")
    block: Any = decoder_blocks(model)[1]
    block.fc1 = Routed(block.fc1, 0)
    model.requires_grad_(False)
    before = rare_weight(model).clone()
    own = GridSpec(5, group_size=16)
    treated = {"1.fc1.rare": own, "1.fc2": None}
    options: dict[str, Any] = {"stored_bits": 32.0, "spec_of": lambda name: treated.get(name, SPEC)}
    records = quantize(InMemoryModel(model), random_ids(6), 3, RTN(), SPEC, **options)
    assert torch.equal(rare_weight(model), RTN().solve(LayerProblem(before, torch.eye(32)), own).weight)
    by_name = {(record.block, record.layer): record for record in records}
    rare, skipped = by_name[1, "fc1.rare"], by_name[1, "fc2"]
    assert (rare.fallback, rare.bits, rare.group_size) == (True, 5, 16)
    assert (skipped.left_alone, skipped.bits, skipped.bits_per_weight) == (True, None, 32)
    refuse_warnings(skipped)  # it was asked for


def test_keep_leaves_it_in_its_own_bits() -> None:
    model, records = run(0, "keep")
    rare = records["fc1.rare"]
    assert (rare.fallback, rare.left_alone, rare.bits_per_weight) == (True, True, 32)
    assert rare.notes == "no calibration token has reached it"
    assert len(rare_weight(model).unique()) == 8 * 32


def test_error_refuses_the_run_with_the_name_of_the_layer() -> None:
    with pytest.raises(InputError, match=r"fc1\.rare in block 1 cannot be calibrated: no calibration token"):
        run(0, "error")


def test_a_calibration_that_is_small_for_all_layers_is_what_was_asked_for() -> None:
    statistics = InputStatistics(torch.eye(64), torch.ones(64), tokens=2, of_tokens=2)
    assert why_not_calibrated(statistics) is None
    routed = InputStatistics(torch.eye(64), torch.ones(64), tokens=3, of_tokens=10)
    assert why_not_calibrated(routed) == "only 3 of 10 calibration tokens have reached its 64 inputs"
    assert why_not_calibrated(None) is None


def test_rounding_is_that_of_the_method_rtn() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    for spec in (GridSpec(3), GridSpec(2, group_size=8, symmetric=True), GridSpec(4, None, False, 16, "mse")):
        problem = LayerProblem(weight * 1e-6, torch.zeros(32, 32))
        assert torch.equal(RoundToNearest().solve(problem, spec).weight, RTN().solve(problem, spec).weight)


def test_the_default_is_not_in_the_digest_and_the_others_are(toy_settings: ToySettings) -> None:
    default, rtn = toy_settings("method=gptq"), toy_settings("method=gptq", "fallback=rtn")
    assert default.digest == rtn.digest
    assert "fallback" not in default.identity()
    others = {toy_settings("method=gptq", f"fallback={fallback}").digest for fallback in ("keep", "error")}
    assert len(others | {default.digest}) == 3
    for fallback in ("keep", "error"):  # where there is nothing to calibrate, it says nothing
        assert toy_settings("method=fp16", f"fallback={fallback}").digest == toy_settings("method=fp16").digest
        uncalibrated = ("method=rtn", "calibration=none")
        assert toy_settings(*uncalibrated, f"fallback={fallback}").digest == toy_settings(*uncalibrated).digest
    with pytest.raises(InputError, match="fallback must be one of rtn, keep, error, not 'fp16'"):
        toy_settings("fallback=fp16")

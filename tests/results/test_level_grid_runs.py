"""Runs on grids of levels: settings, digests, finished blocks and tables."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.rtn import RTN
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.grids.formats import FORMATS
from quantease.outliers import OutlierQuantEase
from runners.config.command_line import check
from runners.errors import InputError
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.packing import pack, packed_bytes, unpack
from runners.results.metrics import CHECKPOINT_SHA256, Status, grid_words
from runners.run.disk import _layer
from runners.run.experiment import run_cell
from runners.tracking.content import run_words
from tests.conftest import ToySettings
from tests.problems import random_problem

GROUPS = {"nf4": 64, "mxfp4": 32, "nvfp4": 16}


@pytest.mark.parametrize("name", FORMATS)
def test_a_grid_is_chosen_by_its_name(name: str) -> None:
    (settings,) = check([f"grid={name}", "method=gptq"], multirun=False)
    spec = settings.run.grid
    assert (spec.bits, spec.group_size, spec.format) == (4, GROUPS[name], FORMATS[name])
    assert run_words(settings) == f"gptq 4 bits {name} group {GROUPS[name]}"
    assert settings.identity()["grid_format"] == name
    (alike,) = check(["bits=4", f"group_size={GROUPS[name]}", "method=gptq"], multirun=False)
    assert alike.digest != settings.digest
    assert "grid_format" not in alike.identity()
    assert "format" not in alike.identity()["grid"]


@pytest.mark.parametrize("wrong", ["bits=3", "symmetric=true", "grid_range=mse"])
def test_what_contradicts_a_grid_is_refused_before_anything_is_loaded(wrong: str) -> None:
    with pytest.raises(InputError, match="grid=nf4"):
        check(["grid=nf4", wrong], multirun=False)


def test_the_reference_of_a_run_is_the_same_on_every_grid() -> None:
    on_levels, on_codes = (check([f"grid={name}"], multirun=False)[0].reference() for name in ("nf4", "int"))
    assert on_levels.digest == on_codes.digest


def test_tables_name_the_grid() -> None:
    run: dict[str, Any] = {"method": "gptq", "bits": 4, "group_size": 32, "grid_format": "mxfp4", "act_order": True}
    assert grid_words(run) == "mxfp4 group 32 act-order"
    assert grid_words(run | {"grid_format": float("nan")}) == "group 32 act-order"  # a gap in a table of several runs


@pytest.mark.parametrize("name", FORMATS)
def test_a_finished_block_comes_back_to_the_bit(name: str) -> None:
    spec = GridSpec(4, group_size=GROUPS[name], format=FORMATS[name])
    problem = random_problem()
    layers = {
        "rtn": RTN().solve(problem, spec),
        "quantease": QuantEase(2).solve(problem, spec),
        "outliers": OutlierQuantEase(0.02, num_iters=2).solve(problem, spec),
    }
    empty = _layer((32, 128), spec, 0.0)  # as the estimate of disk space has it
    assert packed_bytes(empty) == packed_bytes(layers["rtn"])
    again = unpack(*pack(layers))
    for key, layer in layers.items():
        assert torch.equal(again[key].codes, layer.codes)
        assert torch.equal(again[key].weight, layer.weight)
        assert again[key].bits_per_weight == layer.bits_per_weight
        assert again[key].grid.spec == spec


@pytest.mark.parametrize("name", ["nf4", "nvfp4"])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    name: str, toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = (f"grid={name}", "group_size=16", "method=gptq", "keep_checkpoint=true", "calibration.num_sequences=4")
    settings = toy_settings(*wanted)
    save = FinishedBlocks.save

    def once(self: FinishedBlocks, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(FinishedBlocks, "save", once)
    with pytest.raises(KeyboardInterrupt):
        run_cell(settings)
    monkeypatch.undo()
    resumed = run_cell(settings)
    fresh = run_cell(toy_settings(*wanted, f"results={tmp_path / 'fresh'}"))
    assert resumed["status"] == fresh["status"] == Status.DONE
    assert resumed[CHECKPOINT_SHA256] == fresh[CHECKPOINT_SHA256]
    assert resumed["grid_format"] == name
    assert resumed["bits_per_weight"] >= 4.5


def test_a_method_that_fits_scales_of_its_own_is_recorded_as_unsupported(toy_settings: ToySettings) -> None:
    row = run_cell(toy_settings("grid=nvfp4", "method=spqr", "calibration.num_sequences=4"))
    assert row["status"] == Status.UNSUPPORTED
    assert "take grid=int" in row["error"]

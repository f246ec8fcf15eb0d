"""Runs without calibration: the codes are those of a calibrated run, nothing is measured, and most methods refuse it."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quantease.grid import GridSpec
from runners.config.command_line import check
from runners.errors import InputError
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.layers import ERRORS
from runners.results.metrics import RELATIVE_ERROR, ppl
from runners.results.tables import results_table
from runners.run.experiment import run_cell, run_experiment
from runners.sweeps.cells import differences
from tests.conftest import PROJECT, ToySettings
from tests.problems import random_problem

METHODS = sorted(file.stem for file in (PROJECT / "conf" / "method").glob("*.yaml"))
WITHOUT_INPUTS = ("fp16", "rtn", "stored")
QUICK = ("method=rtn", "keep_checkpoint=true")


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a calibration text, or making activations of it, is an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("this is calibration")

    monkeypatch.setattr("runners.run.preflight.draw_sequences", refuse)
    monkeypatch.setattr("runners.quantization.calibration_activations.BlockActivations", refuse)


def codes(folder: Path) -> dict[str, bytes]:
    """Codes, scales and zero points of all layers, whatever the order in which a file has them."""
    files = sorted((folder / "checkpoint").glob("*.safetensors"))
    return {
        f"{file.stem}/{name}": tensor.numpy().tobytes() for file in files for name, tensor in load_file(file).items()
    }


@pytest.mark.usefixtures("no_calibration")
@pytest.mark.parametrize("grid", [("bits=3",), ("bits=2", "group_size=16", "symmetric=true", "grid_range=mse")])
def test_the_codes_are_those_of_a_calibrated_run_and_no_error_is_measured(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, grid: tuple[str, ...]
) -> None:
    settings = toy_settings(*QUICK, "calibration=none", *grid)
    row = run_cell(settings)
    assert row["status"] == "done", row
    monkeypatch.undo()
    calibrated = toy_settings(*QUICK, *grid)
    other = run_cell(calibrated)
    assert len({name.split("/")[0] for name in codes(settings.folder)}) == 2
    assert codes(settings.folder) == codes(calibrated.folder)
    assert row[ppl("wikitext2")] == other[ppl("wikitext2")]
    assert (row["digest"], row["series"]) != (other["digest"], other["series"])
    assert not ERRORS.keys() & row.keys()
    assert ERRORS.keys() <= other.keys()
    assert {key: row[key] for key in row if key.startswith("warnings/")} == dict.fromkeys(
        (key for key in other if key.startswith("warnings/")), 0
    )
    with (settings.folder / "layers.csv").open() as file:
        layers = list(csv.DictReader(file))
    assert len(layers) == 12
    assert {layer[name] for layer in layers for name in ERRORS.values()} == {""}
    assert {layer["dead_columns"] for layer in layers} == {"0"}


@pytest.mark.usefixtures("no_calibration")
def test_a_run_that_was_interrupted_goes_on(
    toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*QUICK, "calibration=none")
    whole, interrupted = (toy_settings(*words, f"results={tmp_path / name}") for name in ("whole", "parts"))
    run_cell(whole)
    save = FinishedBlocks.save

    def stop(self: FinishedBlocks, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(FinishedBlocks, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_cell(interrupted)
    saved: list[int] = []
    monkeypatch.setattr(
        FinishedBlocks, "save", lambda self, index, *rest: (saved.append(index), save(self, index, *rest))
    )
    assert run_cell(interrupted)["status"] == "done"
    assert saved == [1]
    assert codes(interrupted.folder) == codes(whole.folder)


@pytest.mark.usefixtures("no_calibration")
def test_the_unquantized_model_needs_none_and_is_the_same_run(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=fp16", "calibration=none")
    assert settings.digest == toy_settings("method=fp16").digest
    assert run_cell(settings)["status"] == "done"


def test_the_terminal_shows_an_empty_error(toy_settings: ToySettings) -> None:
    rows = run_experiment(toy_settings("method=rtn", "calibration=none"))
    table: Any = results_table(rows).renderables[0]
    column = next(column for column in table.columns if column.header == "layer\nerror")
    assert list(column.cells) == ["-", ""]


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(WITHOUT_INPUTS)))
def test_methods_that_need_inputs_refuse_it(method: str) -> None:
    with pytest.raises(InputError, match=f"calibration=none measures no inputs, but {method} is fitted to the inputs"):
        check([f"method={method}", "calibration=none"], multirun=False)


def test_a_sweep_is_told_all_that_is_wrong_at_once() -> None:
    with pytest.raises(InputError) as error:
        check(["method=rtn,gptq,awq", "bits=2,3", "act_order=false,true", "calibration=none"], multirun=True)
    lines = str(error.value).splitlines()
    assert [line.split(", but ")[1].split()[0] for line in lines] == ["act_order=true", "gptq", "awq"]


def test_it_has_no_settings_and_sweeps_call_it_by_its_name() -> None:
    with pytest.raises(InputError, match=r"there is no setting calibration\.num_sequences"):
        check(["method=rtn", "calibration=none", "calibration.num_sequences=4"], multirun=False)
    cells = check(["method=rtn", "calibration=none,stdlib"], multirun=True)
    assert differences(cells) == ["calibration=none", "calibration=stdlib"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_that_claims_to_need_no_inputs_gives_the_same_answer_for_all(method: str) -> None:
    solver = check([f"method={method}"], multirun=False)[0].run.method.solver
    if solver is None or solver.needs_inputs:
        pytest.skip("it claims nothing")
    problem = random_problem()
    nothing = type(problem)(problem.weight, torch.zeros(()).expand_as(problem.hessian))
    for spec in (GridSpec(3), GridSpec(2, group_size=problem.weight.shape[1] // 2, symmetric=True)):
        assert torch.equal(solver.solve(problem, spec).codes, solver.solve(nothing, spec).codes)


def test_without_errors_the_result_is_whole_only_if_it_says_why(toy_settings: ToySettings) -> None:
    from runners.results import metrics

    settings = toy_settings("method=rtn", "calibration=none")
    run_cell(settings)
    text = (settings.folder / "metrics.json").read_text()
    assert RELATIVE_ERROR not in metrics.parse(text)
    with pytest.raises(ValueError, match="mean_relative_error is missing"):
        metrics.parse(text.replace('"calibration": "none"', '"calibration": "c4"'))

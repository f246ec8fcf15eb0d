"""Whole runs on the toy: what they measure, what they leave behind, and how they end."""

import csv
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from runners.config.run import Method
from runners.errors import InputError
from runners.run import experiment, stages
from runners.run.experiment import run_cell, run_experiment
from tests.conftest import ToySettings

KEYS = {
    "status",
    "ppl/wikitext2",
    "protocol/wikitext2",
    "bits_per_weight",
    "bits_per_parameter",
    "outlier_ratio",
    "layers/mean_relative_error",
    "quantize/seconds",
    "quantize/peak_memory_gb",
    "evaluate/seconds",
}
LAYER_COLUMNS = {
    "block",
    "layer",
    "out_features",
    "in_features",
    "relative_error",
    "seconds",
    "bits_per_weight",
    "outlier_ratio",
    "damping",
    "damping_raised",
    "dead_columns",
    "clipped_scales",
    "non_finite",
    "left_alone",
    "notes",
    "held_out_error",
    "worse_than_rounding",
    "token_error",
    "energy_top_percent",
    "energy_max_over_median",
    "energy_position",
    "energy_position_share",
    "fallback",
    "tokens",
    "bits",
    "group_size",
    "grid",
    "symmetric",
}


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open() as opened:
        return list(csv.DictReader(opened))


def test_a_run_and_its_reference(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=gptq", "bits=3")
    reference, row = run_experiment(settings)
    for one in (reference, row):
        assert one["status"] == "done"
        assert one.keys() >= KEYS
    assert reference["method"] == "fp16"
    assert reference["bits_per_weight"] == 32.0  # the toy is stored in float32
    assert reference["layers/mean_relative_error"] == 0
    # A scale of 16 and a zero point of 3 bits a row: rows of 32 weights everywhere but in fc2, which has rows of 64.
    assert row["bits_per_weight"] == pytest.approx((6144 * (3 + 19 / 32) + 2048 * (3 + 19 / 64)) / 8192)
    assert 0 < row["layers/mean_relative_error"] < 0.2
    assert row["sha256/wikitext2"] == reference["sha256/wikitext2"]


def test_the_cell_is_told_before_its_reference_begins(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn")
    told: list[dict[str, Any]] = []

    def on_cell(metrics: dict[str, Any]) -> None:
        assert not settings.reference().folder.exists()
        told.append(metrics)

    _, row = run_experiment(settings, on_cell)
    assert told == [row]
    run_experiment(settings.replace(force=True), lambda _: pytest.fail("the reference is there already"))
    failing = settings.replace(method=Method("refuses", Refuses()))
    run_experiment(failing, lambda _: pytest.fail("this cell has no result"))


def test_what_a_run_leaves_behind(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "group_size=16")
    run_experiment(settings)
    folder = settings.folder
    assert folder.parent.parent == settings.study_folder
    assert folder.name == f"rtn-3b-{settings.digest}"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    layers = read_csv(folder / "layers.csv")
    assert len(layers) == 12 == metrics["layers/count"]
    assert layers[0].keys() == LAYER_COLUMNS
    assert [row["layer"] for row in layers[-2:]] == ["fc1", "fc2"]
    assert {float(row["bits_per_weight"]) for row in layers} == {3 + 19 / 16}
    mean = sum(float(row["relative_error"]) for row in layers) / len(layers)
    assert metrics["layers/mean_relative_error"] == pytest.approx(mean)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["calibration"]["sha256"] == metrics["calibration/sha256"]
    assert environment["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    windows = read_csv(folder / "windows.csv")
    mean = sum(float(row["nll"]) for row in windows) / len(windows)
    assert metrics["ppl/wikitext2"] == pytest.approx(torch.tensor(mean).double().exp().item())
    assert (folder / "config.yaml").read_text().count("group_size: 16") >= 1
    assert not list(folder.glob("*.partial"))


def test_the_reference_is_the_model_itself(toy_settings: ToySettings, toy_model: Path, data_root: Path) -> None:
    (row,) = run_experiment(toy_settings("method=fp16"))
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    rows = [json.loads(line)["text"] for line in (data_root / "wikitext2" / "test.jsonl").read_text().splitlines()]
    ids = AutoTokenizer.from_pretrained(toy_model)("\n\n".join(rows), return_tensors="pt").input_ids
    windows = ids[0, : ids.shape[1] // 64 * 64].reshape(-1, 64)
    expected = torch.stack([model(window[None], labels=window[None]).loss for window in windows]).mean().exp().item()
    assert row["ppl/wikitext2"] == pytest.approx(expected, rel=1e-5)
    assert row["windows/wikitext2"] == len(windows)


def test_fp16_does_not_depend_on_the_grid_or_the_calibration(toy_settings: ToySettings) -> None:
    a = toy_settings("method=fp16", "bits=2", "seed=1", "calibration=wikitext2")
    b = toy_settings("method=fp16", "bits=4", "group_size=16", "act_order=true")
    assert a.digest == b.digest == toy_settings("method=gptq").reference().digest


def test_a_finished_run_is_skipped_and_says_so(
    toy_settings: ToySettings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=rtn")
    first = run_cell(settings)
    monkeypatch.setattr(experiment, "preflight", lambda _settings: pytest.fail("nothing may be loaded"))
    with caplog.at_level("INFO"):
        second = run_cell(settings)
    assert "is already done" in caplog.text
    assert second["ppl/wikitext2"] == first["ppl/wikitext2"]


def test_force_runs_it_again(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn")
    run_cell(settings)
    before = (settings.folder / "metrics.json").stat().st_mtime_ns
    run_cell(settings.replace(force=True))
    assert (settings.folder / "metrics.json").stat().st_mtime_ns > before


def test_results_repeat_to_the_last_digit(toy_settings: ToySettings, tmp_path: Path) -> None:
    rows = [run_cell(toy_settings("method=quantease", f"results={tmp_path / name}")) for name in "ab"]
    for key in ("ppl/wikitext2", "layers/mean_relative_error", "calibration/sha256"):
        assert rows[0][key] == rows[1][key]


def test_an_unexpected_error_becomes_a_row_with_stage_and_traceback(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(stages, "BlockwiseEvaluation", fail)
    settings = toy_settings("method=rtn")
    row = run_cell(settings)
    assert (row["status"], row["stage"]) == ("failed", "evaluate")
    assert row["error"] == "ZeroDivisionError: in the middle"
    assert "Traceback" in row["traceback"]
    assert json.loads((settings.folder / "metrics.json").read_text())["status"] == "failed"
    monkeypatch.undo()
    assert run_cell(settings.replace(retry_failed=True))["status"] == "done"


@pytest.fixture
def with_a_dead_input(model_copy: Path) -> Path:
    """The toy with an output of the first fc1 that the ReLU leaves at zero for the layer after it."""
    weights = load_file(model_copy / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"model.decoder.layers.0.fc1.{name}"][7] = 0
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    return model_copy


def test_warnings_are_counted(toy_settings: ToySettings, with_a_dead_input: Path) -> None:
    settings = toy_settings("method=rtn", f"model.path={with_a_dead_input}")
    row = run_cell(settings)
    assert row["status"] == "done"
    dead = {
        (layer["block"], layer["layer"]): int(layer["dead_columns"])
        for layer in read_csv(settings.folder / "layers.csv")
    }
    assert dead["0", "fc2"] >= 1
    assert row["warnings/dead_columns"] == sum(dead.values())
    assert row["warnings/left_alone"] == row["warnings/damping_raised"] == row["warnings/non_finite"] == 0


def test_warnings_can_be_errors_and_the_layers_so_far_are_kept(
    toy_settings: ToySettings, with_a_dead_input: Path
) -> None:
    settings = toy_settings("method=rtn", f"model.path={with_a_dead_input}", "warnings=error")
    row = run_cell(settings)
    assert (row["status"], row["stage"]) == ("failed", "quantize")
    assert re.fullmatch(r"fc2 in block 0: dead columns: \d+; warnings=record goes on and records it", row["error"])
    assert read_csv(settings.folder / "layers.csv")[-1]["layer"] == "fc2"
    assert settings.digest != toy_settings("method=rtn", f"model.path={with_a_dead_input}").digest


@dataclass(frozen=True)
class Refuses(LayerSolver):
    """A method that cannot do anything."""

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        raise Unsupported("not at this width")


def test_what_a_method_cannot_do_is_recorded_as_unsupported(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn").replace(method=Method("refuses", Refuses()))
    row = run_cell(settings)
    assert (row["status"], row["stage"]) == ("unsupported", "quantize")
    assert row["error"] == "self_attn.q_proj in block 0: not at this width"


def test_a_run_that_cannot_be_recorded_says_so(toy_settings: ToySettings, tmp_path: Path) -> None:
    settings = toy_settings("method=rtn")
    assert not (tmp_path / "results").exists()  # checking the settings makes no folder
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(InputError, match="nothing can be written to"):
        run_cell(settings)


def test_a_run_keeps_its_identity_when_its_data_sets_vanish(
    toy_settings: ToySettings, data_root: Path, tmp_path: Path
) -> None:
    """They are read at the beginning; what is written at the end must not be of other data."""
    own = shutil.copytree(data_root, tmp_path / "data")
    settings = toy_settings("method=rtn", f"data_root={own}")
    digest = settings.digest
    shutil.rmtree(own)
    expected = toy_settings("method=rtn", f"data_root={data_root}")
    assert (settings.digest, settings.series) == (digest, expected.series)

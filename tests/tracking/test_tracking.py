"""What is tracked of a run on W&B, read back from its offline files, and that a tracker never ends a run."""

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import wandb
from safetensors.torch import load_file, save_file

from runners.config.settings import Settings
from runners.errors import InputError
from runners.results.layers import LayerRecord
from runners.run import experiment
from runners.run.experiment import run_cell
from runners.tracking import content, weights_and_biases
from runners.tracking.figures import layer_error_figure, pixels
from runners.tracking.tracker import track
from tests.conftest import ToySettings


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def inspect_offline_run(settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary that W&B's own reader gives of a run in its study's folder, and its records."""
    (run,) = (settings.study_folder / "wandb").glob(f"offline-run-*-{settings.run_name}-*")
    inspect = ["wandb", "leet", "inspect", "--json"]
    summary = subprocess.run([*inspect, "--summary", run], capture_output=True, check=True)
    records = subprocess.run([*inspect, run], capture_output=True, check=True)
    return json.loads(summary.stdout), [json.loads(line) for line in records.stdout.splitlines()]


def history(records: list[dict[str, Any]], key: str) -> list[float]:
    """The points of one curve."""
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [float(item[key]) for item in items if key in item]


def test_an_offline_run_can_be_read_back(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=gptq", "group_size=16", "tracker=wandb", "study=reading")
    row = run_cell(settings)
    assert row["tracker"] == f"wandb leet {settings.study_folder / 'wandb'}"
    run, records = inspect_offline_run(settings)
    assert run["run_id"] == f"{settings.run_name}-reading"
    assert run["name"] == f"gptq 3 bits group 16 s0 toy · {settings.digest}"
    assert (run["state"], run["exit_code"]) == ("finished", 0)
    (start,) = [record["run"] for record in records if record["type"] == "run"]
    assert (start["run_group"], start["job_type"]) == ("reading", "quantize")
    assert start["tags"] == ["gptq", "toy", "3 bits", "group 16", "seed 0"]
    config = run["config"]
    assert (config["method"]["name"], config["bits"], config["group_size"], config["seed"]) == ("gptq", 3, 16, 0)
    assert config[content.SETTING] == f"gptq 3 bits group 16 toy · {settings.series}"
    assert {key: run["summary"][key] for key in row if key not in ("folder", "tracker")} == {
        key: row[key] for key in row if key not in ("folder", "tracker")
    }


def test_the_curves_and_tables_are_those_of_the_files(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "tracker=wandb")
    run_cell(settings)
    run, records = inspect_offline_run(settings)
    layers = pd.read_csv(settings.folder / "layers.csv")
    fc1 = layers[layers["layer"] == "fc1"]
    assert history(records, "layer_error/fc1") == pytest.approx(list(fc1["relative_error"]))
    assert history(records, "layer_error_held_out/fc1") == pytest.approx(list(fc1["held_out_error"]))
    assert history(records, "perplexity/wikitext2") == [run["summary"]["ppl/wikitext2"]]
    assert run["summary"]["tables/layers"]["nrows"] == 12
    assert run["summary"]["tables/windows"]["nrows"] == len(pd.read_csv(settings.folder / "windows.csv"))
    assert run["summary"][content.LAYER_ERROR_FIGURE]["format"] == "png"
    assert (settings.study_folder / "wandb" / "data" / "artifacts" / "staging").is_dir()


def test_the_first_charts_are_layer_errors_and_perplexities(toy_settings: ToySettings) -> None:
    """Viewers sort charts by name, and make one of every key of the history: none is of a mere position."""
    settings = toy_settings("method=rtn", "tracker=wandb")
    run_cell(settings)
    _, records = inspect_offline_run(settings)
    points = [record["history"] for record in records if record["type"] == "history"]
    keys = sorted({key for point in points for key in point["item"] if not key.startswith("_")})
    charts = list(dict.fromkeys(key.partition("/")[0] for key in keys))
    assert charts == ["figures", "layer_error", "layer_error_held_out", "perplexity", "tables"]
    steps = [int(point["item"]["_step"]) for point in points if "layer_error/fc1" in point["item"]]
    assert steps == [0, 1]


def test_the_runs_of_a_study_lie_in_one_folder(toy_settings: ToySettings) -> None:
    cells = [toy_settings(f"method={method}", "tracker=wandb") for method in ("fp16", "rtn")]
    for settings in cells:
        run_cell(settings)
        inspect_offline_run(settings)
    folders = sorted(file.name.split("-", 3)[-1] for file in (cells[0].study_folder / "wandb").glob("offline-run-*"))
    assert folders == [f"{settings.run_name}-runs" for settings in cells]
    run, records = inspect_offline_run(cells[0])
    assert next(record["run"] for record in records if record["type"] == "run")["job_type"] == "reference"
    assert content.LAYER_ERROR_FIGURE not in run["summary"]


def test_a_failed_run_ends_as_failed(toy_settings: ToySettings, model_copy: Path) -> None:
    weights = load_file(model_copy / "model.safetensors")
    weights["model.decoder.layers.1.fc1.weight"][3, 3] = torch.nan
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    settings = toy_settings("method=rtn", "tracker=wandb", f"model.path={model_copy}")
    row = run_cell(settings)
    assert (row["status"], row["stage"]) == ("failed", "load")
    assert "model.decoder.layers.1.fc1.weight" in row["error"]
    assert "NaN" in row["error"]
    run, _ = inspect_offline_run(settings)
    assert (run["state"], run["exit_code"]) == ("failed", 1)
    assert run["summary"]["status"] == "failed"


def test_an_interrupted_run_ends_as_failed(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.Stages, "open", interrupt)
    settings = toy_settings("method=rtn", "tracker=wandb")
    with pytest.raises(KeyboardInterrupt):
        run_cell(settings)
    run, _ = inspect_offline_run(settings)
    assert (run["state"], run["exit_code"]) == ("failed", 1)


def _fails(*_: object, **__: object) -> None:
    raise RuntimeError("the dashboard is on fire")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda patch: patch.setattr(wandb, "init", _fails),
        lambda patch: patch.setattr(wandb, "Table", _fails),
        lambda patch: patch.setattr(content.Curves, "points", _fails),
    ],
    ids=["start", "tables", "curves"],
)
def test_a_tracker_that_breaks_does_not_end_a_run(
    toy_settings: ToySettings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[pytest.MonkeyPatch], None],
) -> None:
    break_it(monkeypatch)
    row = run_cell(toy_settings("method=rtn", "tracker=wandb"))
    assert row["status"] == "done"
    assert "the dashboard is on fire" in caplog.text


def test_a_server_that_does_not_answer_leaves_the_run_offline(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    init = wandb.init
    calls: list[dict[str, Any]] = []

    def only_offline(**options: Any) -> Any:
        calls.append(options)
        if options["mode"] == "online":
            raise wandb.Error("no answer")
        return init(**options)

    monkeypatch.setattr(wandb, "init", only_offline)
    monkeypatch.setattr(weights_and_biases, "answers", lambda: True)
    settings = toy_settings("method=rtn", "tracker=wandb", "tracker.mode=online")
    assert run_cell(settings)["status"] == "done"
    assert [call["mode"] for call in calls] == ["online", "offline"]
    assert "resume" not in calls[0]  # a run that is made again replaces what it was
    assert "W&B does not answer (no answer)" in caplog.text
    inspect_offline_run(settings)


def test_names_are_short_and_say_what_differs(toy_settings: ToySettings) -> None:
    plain = toy_settings("method=rtn", "bits=4", "seed=2")
    special = toy_settings("method=rtn", "symmetric=true", "act_order=true", "grid_range=mse", "group_size=16")
    assert content.title(plain) == f"rtn 4 bits per-channel s2 toy · {plain.digest}"
    assert content.title(special) == f"rtn 3 bits group 16 symmetric mse act-order s0 toy · {special.digest}"
    assert content.title(plain.reference()) == f"fp16 toy · {plain.reference().digest}"
    other = toy_settings("method=rtn", "bits=4", "seed=1")
    assert content.config(plain)[content.SETTING] == content.config(other)[content.SETTING]
    assert content.run_id("rtn-4b-0123456789", "my study/#2?") == "rtn-4b-0123456789-my_study__2_-92b232fc"


@pytest.mark.parametrize("name", ["m" * 100, "模型" * 20, "a model: 3%, #1 'it'"], ids=["long", "unicode", "marks"])
def test_long_and_odd_names_lose_no_run(name: str, toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "tracker=wandb")
    model = dataclasses.replace(settings.run.model, name=name)
    settings = settings.replace(model=model, study=name.strip())
    with track(settings, settings.folder) as tracker:
        assert tracker.where is not None
        tracker.finish({"status": "done"}, [])
    (folder,) = (settings.study_folder / "wandb").glob("offline-run-*")
    summary = subprocess.run(["wandb", "leet", "inspect", "--json", folder], capture_output=True, check=True).stdout
    (start,) = [json.loads(line)["run"] for line in summary.splitlines() if json.loads(line)["type"] == "run"]
    assert re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", start["run_id"])
    assert start["tags"][1] == (name if len(name) <= 64 else content.cut(name, 64))
    assert all(len(tag) <= 64 for tag in start["tags"])
    assert len(start["display_name"]) <= 128


@pytest.mark.parametrize("project", ["a/b", "100%", "p" * 129])
def test_a_project_that_wandb_would_refuse_is_refused_at_once(project: str, toy_settings: ToySettings) -> None:
    with pytest.raises(InputError, match=r"project must .*128 characters"):
        toy_settings("method=rtn", "tracker=wandb", f"tracker.project={project}")


def test_what_is_shortened_or_cleaned_stays_distinct() -> None:
    longest = {content.cut("m" * 70 + end, content.LONGEST_TAG) for end in "ab"}
    assert [len(tag) for tag in longest] == [64, 64]
    assert content.cut("m" * 64, content.LONGEST_TAG) == "m" * 64
    ids = [content.run_id("rtn-4b-0123456789", study) for study in ("模型", "数据", "my study", "my_study", "s" * 120)]
    ids += [content.run_id("m" * 120 + "-4b-0123456789", "s"), content.run_id("m" * 120 + "-4b-9876543210", "s")]
    assert len(set(ids)) == len(ids)
    assert all(len(content.attempt_id(each, 2)) <= 128 for each in ids)
    assert [content.without_attempt(content.attempt_id(each, n)) for each in ids for n in (0, 1)] == [
        each for each in ids for _ in (0, 1)
    ]


def test_curves_of_two_layers_are_never_one() -> None:
    curves = content.Curves()
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    points = [curves.points(LayerRecord(b, layer, 1, 1, relative_error=0.5)) for b in (0, 1) for layer in layers]
    names = [next(iter(point)) for point in points]
    assert names == [f"layer_error/{name}" for name in ("c_attn", "c_proj", "c_fc", "mlp_c_proj")] * 2


def test_what_is_not_a_number_is_no_point_of_a_curve() -> None:
    record = LayerRecord(0, "fc1", 1, 1, relative_error=float("nan"), held_out_error=0.5)
    assert content.Curves().points(record) == {"layer_error_held_out/fc1": 0.5}


def test_tables_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "windows.csv").write_text("text,window,nll,kl\nNA,0,1.5,\nnull,1,,\n")
    table = content.read_table(tmp_path / "windows.csv")
    assert list(table) == ["text", "window", "nll"]  # a column that is empty altogether says nothing
    assert table.to_numpy().tolist() == [["NA", 0, 1.5], ["null", 1, None]]


def test_a_failed_run_does_not_show_an_earlier_ones_files(tmp_path: Path) -> None:
    for name in content.TABLES:
        (tmp_path / f"{name}.csv").write_text("block\n1\n")
    assert set(content.tables(tmp_path, "failed", [])) == set()
    record = LayerRecord(0, "fc1", 1, 1)
    assert set(content.tables(tmp_path, "failed", [record])) == {"layers", "sweeps"}
    assert set(content.tables(tmp_path, "done", [record])) == {"layers", "sweeps", "windows"}


def test_the_sweeps_become_a_curve(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "tracker=wandb")
    with track(settings, settings.folder) as tracker:
        settings.folder.mkdir(parents=True)
        text = "block,layer,sweep,relative_error\n0,fc1,0,0.4\n0,fc1,1,0.2\n0,fc2,0,0.2\n0,fc2,1,0.1\n"
        (settings.folder / "sweeps.csv").write_text(text)
        tracker.finish({"status": "done", content.CHECKPOINT: "ab12"}, [LayerRecord(0, "fc1", 1, 1)])
    run, records = inspect_offline_run(settings)
    assert history(records, content.CONVERGENCE) == pytest.approx([0.3, 0.15])
    assert history(records, content.SWEEP) == [0, 1]
    assert run["summary"]["tables/sweeps"]["nrows"] == 4
    assert run["summary"][content.CHECKPOINT] == "ab12"


def test_the_figure_has_a_line_for_each_layer_of_a_block() -> None:
    errors = {"fc1": [0.1, 0.2], "fc2": [0.3, 0.0]}
    records = [LayerRecord(b, name, 1, 1, values[b]) for b in (0, 1) for name, values in errors.items()]
    figure = layer_error_figure(records)
    lines = {str(line.get_label()): list(line.get_ydata()) for line in figure.axes[0].lines}  # pyright: ignore[reportArgumentType]
    assert lines == {"fc1": [0.1, 0.2], "fc2": [0.3]}
    assert pixels(figure).shape == (400, 640, 3)
    assert not layer_error_figure([LayerRecord(0, "fc1", 1, 1)]).axes[0].lines  # all errors are zero

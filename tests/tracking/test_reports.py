"""The saved workspace and the report: they show what is really tracked. Saving itself needs W&B's server."""

import json
from pathlib import Path
from typing import Any

import pytest

from runners import reports
from runners.arguments import invoke
from runners.errors import InputError
from runners.reports import main, metric_names, report, workspace
from runners.run.experiment import run_cell
from runners.tracking import content
from tests.conftest import ToySettings, missing
from tests.tracking.test_tracking import inspect_offline_run

pages = pytest.importorskip("wandb_workspaces.reports.v2.interface", reason=missing("wandb-workspaces"))
NAMES = [
    "bits_per_weight",
    "layers/mean_held_out_error",
    "layers/mean_relative_error",
    "ppl/wikitext2",
    "quantize/seconds",
    "warnings/left_alone",
    "zero_shot/lambada/acc",
    "zero_shot/lambada/acc_stderr",
]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What W&B's server is asked for while a report is built: the number of a project."""
    monkeypatch.setattr(pages, "_get_api", lambda: None)
    monkeypatch.setattr(pages, "execute_graphql", lambda *_: {"project": {"internalId": "1"}})


def written(page: Any) -> str:
    """The page as it would be sent."""
    return page._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("make", [workspace, report])
def test_both_pages_hold_every_panel_and_only_the_studys_runs(make: Any) -> None:
    page = json.loads(written(make("mine", "me", "bench", NAMES)))
    text = json.dumps(page)
    for heading in ("Perplexity", "Size against perplexity", "Layer error", "Time and memory", "Warnings"):
        assert heading in text
    for metric in ("summary_metrics.ppl/wikitext2", "summary_metrics.zero_shot/lambada/acc", "summary:bits_per_weight"):
        assert f'"{metric}"' in text
    for curve in (content.LAYER_ERROR, content.HELD_OUT):
        assert f'"metricRegex": "^{curve}.*"' in text
    assert f'"metrics": ["{content.CONVERGENCE}"]' in text
    for axis in ("_step", content.SWEEP):
        assert f'"xAxis": "{axis}"' in text
    assert f'"mediaKeys": ["{content.LAYER_ERROR_FIGURE}"]' in text
    assert f'"summary:{content.CHECKPOINT}"' in text
    assert '"groupBy": "setting.value"' in text
    assert '{"section": "run", "name": "group"}, "op": "=", "value": "mine"' in text
    assert "acc_stderr" not in text


@pytest.mark.usefixtures("server")
def test_a_report_lists_what_has_failed() -> None:
    text = json.dumps(json.loads(written(report("mine", "me", "bench", NAMES))))
    assert '{"section": "run", "name": "state"}, "op": "!=", "value": "finished"' in text
    assert '"summary:error"' in text


def test_the_pages_ask_for_what_a_run_really_tracks(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = toy_settings("method=rtn", "tracker=wandb", "study=mine")
    run_cell(settings)
    run, _ = inspect_offline_run(settings)
    page = json.loads(written(workspace("mine", "me", "bench", metric_names(settings.study_folder))))
    panels = [
        panel["config"] for section in page["section"]["panelBankConfig"]["sections"] for panel in section["panels"]
    ]
    asked = {metric for panel in panels for metric in panel.get("metrics", [])} | {
        panel[axis] for panel in panels for axis in ("xAxis", "yAxis") if axis in panel
    }
    names = {name.removeprefix("summary_metrics.").removeprefix("summary:") for name in asked}
    of_sweeps = {content.CONVERGENCE, content.SWEEP}  # only methods that go over the columns repeatedly have them
    assert names - of_sweeps <= set(run["summary"])
    assert "ppl/wikitext2" in names
    assert content.SETTING in run["config"]


@pytest.mark.usefixtures("server")
def test_both_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb_workspaces.workspaces as ws

    saved: list[Any] = []

    def save(page: Any) -> Any:
        saved.append(page)
        return type("Saved", (), {"url": f"https://wandb.example/{len(saved)}"})

    monkeypatch.setattr(ws.Workspace, "save", save)
    monkeypatch.setattr(pages.Report, "save", save)
    monkeypatch.setattr(reports, "logged_in", lambda: True)
    make_study(tmp_path)
    invoke(["study=mine", "entity=me", f"results={tmp_path}"], main)
    assert capsys.readouterr().out == "https://wandb.example/1\nhttps://wandb.example/2\n"
    assert [page.project for page in saved] == ["quantease-bench"] * 2


def make_study(results: Path) -> None:
    folder = results / "mine" / "toy" / "rtn-3b-0123456789"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"status": "done", "ppl/wikitext2": 9.0}')


def test_a_project_that_is_not_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb_workspaces.workspaces as ws

    def save(_: Any) -> Any:
        raise ValueError("no such project")

    monkeypatch.setattr(ws.Workspace, "save", save)
    monkeypatch.setattr(reports, "logged_in", lambda: True)
    make_study(tmp_path)
    with pytest.raises(InputError, match="W&B has not saved the pages of study mine: no such project"):
        invoke(["study=mine", "entity=me", f"results={tmp_path}"], main)


def test_mistakes_are_answered_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"missing: entity; see python -m runners\.reports --help"):
        invoke([f"results={tmp_path}"], main)
    with pytest.raises(InputError, match="has no runs: set study=NAME"):
        invoke(["entity=me", "study=mine", f"results={tmp_path}"], main)
    make_study(tmp_path)
    monkeypatch.setattr(reports, "logged_in", lambda: False)
    with pytest.raises(InputError, match="run wandb login"):
        invoke(["entity=me", "study=mine", f"results={tmp_path}"], main)
    monkeypatch.setattr(reports, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[reports\]"'):
        invoke(["entity=me"], main)

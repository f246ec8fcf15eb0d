"""Input that cannot work is refused for the whole command, and leaves nothing: no folder, no row, no tracker's run."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from runners import cli, hub
from runners.config.command_line import check
from runners.config.settings import Settings
from runners.errors import InputError
from runners.models import checkpoint
from runners.results.metrics import METRICS, Reason
from runners.results.run_folder import RunFolder
from runners.results.studies import LAST
from runners.run import input_check
from runners.run.experiment import failure_metrics, run_cell
from runners.sweeps.engines import runs_elsewhere
from runners.sweeps.refusal import refuse_impossible
from tests.conftest import PROJECT, ToySettings
from tests.sweeps.conftest import needs_launcher

Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def nothing_is_known() -> None:
    input_check._opened.cache_clear()
    input_check._data_problem.cache_clear()


@pytest.fixture
def refused(
    toy_model: Path,
    data_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """What a command prints that is refused, and leaves nothing behind; the tracker is W&B, as nobody sets another."""
    results = tmp_path / "results"
    toy = ["model=local", f"model.path={toy_model}", f"data_root={data_root}", "evaluation=wikitext2"]

    def command(*words: str) -> str:
        kept = [word for word in toy if word.partition("=")[0] not in {other.partition("=")[0] for other in words}]
        monkeypatch.setattr(sys, "argv", ["run.py", *kept, f"results={results}", *words])
        before = sorted(results.rglob("*"))
        capsys.readouterr()  # what the test itself has printed, as a run does
        with pytest.raises(SystemExit) as leaving:
            cli.start(lambda: pytest.fail("nothing may run"))
        assert leaving.value.code == cli.WRONG_INPUT
        assert sorted(results.rglob("*")) == before
        assert results.exists() == bool(before)
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err.removeprefix("error: ").rstrip("\n")

    return command


IMPOSSIBLE = {
    "model.path=/nowhere/model": "there is no folder /nowhere/model",
    "model.path=nobody/nothing": "the model nobody/nothing is not a folder here, and cannot be downloaded",
    "model.path=.": "holds no config.json",
    "group_size=12": "group_size=12 does not divide the 32 inputs of self_attn.",
    "data_root=/nowhere/data": "the data set wikitext2 (Salesforce/wikitext, test) is not in the data root",
    "device=cuda:99": "device=cuda:99 cannot be used: torch finds ",
    "evaluation.tasks=[no_such_task]": "evaluation.tasks names no_such_task, which lm-eval does not know: ",
    "data_root=null": "the data set wikitext2 (Salesforce/wikitext, test) cannot be had from the hub",
}


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["single", "sweep"])
@pytest.mark.parametrize("word", IMPOSSIBLE)
def test_input_that_cannot_work_leaves_nothing(refused: Refused, word: str, sweep: list[str]) -> None:
    said = refused("method=rtn", "calibration=stdlib", word, *sweep)
    assert IMPOSSIBLE[word] in said
    assert "\n" not in said


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=workers"]])
def test_a_sweep_names_every_problem_and_its_cells_at_once(refused: Refused, launcher: list[str]) -> None:
    if launcher:
        needs_launcher("joblib")
    words = ["method=fp16,rtn,gptq", "group_size=12,16,24", "evaluation=wikitext2,paper", "bits=3", "calibration=c4"]
    said = refused(*words, *launcher, "-m")
    head, *problems = said.splitlines()
    assert head == "8 of 14 cells cannot work, so none was started:"
    assert [line.partition(": ")[2].partition(" the ")[0] for line in problems] == [
        "group_size=12 does not divide",
        "group_size=24 does not divide",
    ]
    assert problems[0].startswith("  toy rtn 3 bits group_size=12")
    assert "toy gptq 3 bits group_size=24" in problems[1]


def test_the_study_that_was_run_last_stays_that_of_the_last_run(
    refused: Refused, toy_settings: ToySettings, tmp_path: Path
) -> None:
    run_cell(toy_settings("method=fp16"))
    (tmp_path / "results" / LAST).write_text("runs")
    refused("study=other", "group_size=12")
    refused("study=other", "group_size=12,24", "-m")
    assert (tmp_path / "results" / LAST).read_text() == "runs"


def test_what_is_done_needs_no_input(toy_settings: ToySettings, model_copy: Path) -> None:
    words = [f"model.path={model_copy}", "method=rtn"]
    done, other = toy_settings(*words), toy_settings(*words, "bits=4")
    for cell in (done, done.reference()):
        run_cell(cell)
    (
        model_copy / "model.safetensors"
    ).unlink()  # the digests are known, as of a model of the hub that is cached no more
    refuse_impossible([done], is_run_here=True)
    with pytest.raises(InputError, match=r"^1 of 2 cells cannot work, .*\n  damaged rtn 4 bits: .* holds no weights"):
        refuse_impossible([done, other], is_run_here=True)
    with pytest.raises(InputError, match="holds no weights"):
        refuse_impossible([done.replace(force=True)], is_run_here=True)
    metrics = RunFolder(done.folder).metrics()
    assert metrics is not None
    assert metrics["status"] == "done"
    (done.reference().folder / METRICS).unlink()  # the reference that it is compared with is to be measured again
    with pytest.raises(InputError, match="holds no weights"):
        refuse_impossible([done], is_run_here=True)


def test_what_has_failed_is_left_alone_unless_it_is_to_be_retried(toy_settings: ToySettings) -> None:
    cell = toy_settings("method=rtn", "group_size=12")
    RunFolder(cell.folder).write_json(
        METRICS, failure_metrics(cell, Reason.EXCEPTION, "preflight", "it does not divide")
    )
    refuse_impossible([cell], is_run_here=True)
    with pytest.raises(InputError, match="group_size=12 does not divide"):
        refuse_impossible([cell.replace(retry_failed=True)], is_run_here=True)


def test_inputs_are_opened_once_for_all_cells(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(
        input_check,
        "model_skeleton",
        lambda model, stored: opened.append(model) or checkpoint.model_skeleton(model, stored=stored),
    )
    refuse_impossible([toy_settings("method=rtn", f"bits={bits}") for bits in (2, 3, 4)], is_run_here=True)
    assert len(opened) == 1


def test_a_text_that_may_be_skipped_may_be_missing(toy_settings: ToySettings) -> None:
    words = ["method=rtn", "calibration=stdlib", "evaluation=wikitext2", "data_root=/nowhere"]
    refuse_impossible([toy_settings(*words, "evaluation.skip_missing=true")], is_run_here=True)
    with pytest.raises(InputError, match=r"the data set c4 \(allenai/c4, train\) is not in the data root"):
        refuse_impossible(
            [toy_settings(*words[:1], "calibration=c4", *words[2:], "evaluation.skip_missing=true")], is_run_here=True
        )


def test_other_machines_need_not_share_this_ones_hub_but_its_files() -> None:
    (cell,) = check(["model=opt-13b"], multirun=False)
    refuse_impossible([cell], is_run_here=False)
    with pytest.raises(InputError, match="cannot be downloaded"):
        refuse_impossible([cell], is_run_here=True)
    with pytest.raises(InputError, match="is not in the data root"):
        refuse_impossible([cell.replace(data_root="/nowhere")], is_run_here=False)


def test_which_launchers_run_elsewhere() -> None:
    def launcher(name: str) -> Any:
        return OmegaConf.create({"_target_": f"hydra_plugins.{name}", "ray": {"init": {"address": "auto"}}})

    assert runs_elsewhere(launcher("hydra_submitit_launcher.submitit_launcher.SlurmLauncher"))
    assert not runs_elsewhere(launcher("hydra_submitit_launcher.submitit_launcher.LocalLauncher"))
    assert not runs_elsewhere(launcher("hydra_joblib_launcher.joblib_launcher.JoblibLauncher"))
    ray = launcher("hydra_ray_launcher.ray_launcher.RayLauncher")
    assert runs_elsewhere(ray)
    ray.ray.init.address = "local"
    assert not runs_elsewhere(ray)


def test_of_a_hub_that_answers_only_the_configuration_is_downloaded(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here: the group size is checked against a model whose weights are not downloaded."""
    asked: list[list[str]] = []

    def download(_path: str, _revision: str | None, patterns: list[str] = hub.PATTERNS) -> tuple[Path, str]:
        asked.append(patterns)
        folder = tmp_path / "snapshot"
        folder.mkdir(exist_ok=True)
        shutil.copy(toy_model / "config.json", folder)
        return folder, folder.name

    monkeypatch.setattr(checkpoint, "hub_answers", lambda: True)
    monkeypatch.setattr(checkpoint, "download_snapshot", download)
    (cell,) = check(["model=opt-125m", "evaluation=stdlib", "calibration=stdlib", "group_size=12"], multirun=False)
    with pytest.raises(InputError, match="group_size=12 does not divide the 32 inputs"):
        refuse_impossible([cell], is_run_here=True)
    assert asked == [["config.json"]]


def test_the_cells_of_a_published_experiment_can_work() -> None:
    cells: list[Settings] = check(["experiment=tiny", "results=" + str(PROJECT / "nowhere")], multirun=True)
    refuse_impossible(cells, is_run_here=True)

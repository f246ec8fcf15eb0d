"""The same sweep under every launcher gives the same results, and what is not installed gets a sentence."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from runners.config import launchers
from runners.config.command_line import check
from runners.errors import InputError
from runners.run.experiment import run_experiment
from tests.conftest import PROJECT
from tests.sweeps.conftest import needs_launcher

PRESETS = sorted(path.stem for path in (PROJECT / "conf" / "hydra" / "launcher").glob("*.yaml"))
RUN_HERE = ["workers", "slurm_local", "ray_local"]  # `slurm` needs one


@pytest.fixture(scope="module")
def sweep(toy_model: Path, data_root: Path) -> list[str]:
    """The sweep that every launcher runs, without the launcher and the results folder."""
    toy = ["model=local", f"model.path={toy_model}", "calibration.num_sequences=6", "calibration=c4", "tracker=none"]
    return [*toy, "method=rtn,gptq", "evaluation=wikitext2", "study=swept", f"data_root={data_root}"]


@pytest.fixture(scope="module")
def expected(sweep: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The rows of its cells and their reference, by digest, as this process measures them."""
    cells = check([*sweep, f"results={tmp_path_factory.mktemp('expected')}"], multirun=True)
    return {row["digest"]: row for cell in cells for row in run_experiment(cell)}


SLOW = ("slurm_local", "ray_local")  # workers is their quick twin
CASES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ("basic", *RUN_HERE)]


@pytest.mark.parametrize("launcher", CASES)
def test_the_same_sweep_gives_the_same_results(
    launcher: str, sweep: list[str], expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    if launcher != "basic":
        needs_launcher(launchers.EXTRAS[launcher])
    command = [sys.executable, "run.py", "-m", f"hydra/launcher={launcher}", *sweep, f"results={tmp_path}"]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr
    rows = [json.loads(file.read_text()) for file in tmp_path.glob("swept/toy/*/metrics.json")]
    assert sorted(row["method"] for row in rows) == ["fp16", "gptq", "rtn"]
    for row in rows:
        assert row["status"] == "done"
        for key in ("ppl/wikitext2", "layers/mean_relative_error", "bits_per_weight"):
            assert row[key] == pytest.approx(expected[row["digest"]][key], rel=1e-6), key
    assert not {entry.name for entry in PROJECT.iterdir()} & {".submitit", "outputs", "multirun"}


@pytest.fixture(scope="module")
def copied_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a run needs: runs without results=FOLDER must not land in the project that is tested."""
    copy = tmp_path_factory.mktemp("copied")
    for part in ("conf", "quantease", "baselines", "runners"):
        shutil.copytree(PROJECT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "run.py", copy)
    return copy


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("workers", "slurm_local"))]
)
def test_results_go_to_the_project_or_to_the_folder_that_is_named_from_where_the_command_was_given(
    launcher: str, copied_project: Path, toy_model: Path, data_root: Path, tmp_path: Path
) -> None:
    if launcher != "basic":
        needs_launcher(launchers.EXTRAS[launcher])
    # Relative paths: cells start in the folder in which the command was given, whoever starts them.
    for name, folder in {"model": toy_model, "data": data_root}.items():
        (tmp_path / name).symlink_to(folder)
    toy = [
        "model=local",
        "model.path=model",
        "data_root=data",
        "evaluation=wikitext2",
        "tracker=none",
        "model.name=toy",
    ]
    command = [sys.executable, str(copied_project / "run.py"), "-m", f"hydra/launcher={launcher}", "method=rtn", *toy]
    command += ["calibration=none", f"study={launcher}"]
    for place, words in ((copied_project / "results", []), (tmp_path / "here", ["results=here"])):
        answer = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        rows = [json.loads(file.read_text()) for file in place.glob(f"{launcher}/toy/*/metrics.json")]
        assert [row["status"] for row in rows] == ["done", "done"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"model", "data", "here"}
    digests = {file.name for place in (copied_project / "results", tmp_path / "here") for file in place.glob("*/toy/*")}
    assert len(digests) == 2  # of rtn and its reference, wherever they are kept


@pytest.mark.parametrize("launcher", PRESETS)
def test_what_is_not_installed_gets_a_sentence(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "_is_there", lambda _module: False)
    extra = {"workers": "joblib", "slurm": "submitit", "slurm_local": "submitit"}.get(launcher, "ray")
    with pytest.raises(InputError) as error:
        check([f"hydra/launcher={launcher}", "method=rtn"], multirun=True)
    assert str(error.value) == f'hydra/launcher={launcher} is not installed: pip install -e ".[{extra}]"'


@pytest.mark.parametrize("launcher", PRESETS)
def test_presets_compose(launcher: str) -> None:
    needs_launcher(launchers.EXTRAS[launcher])
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        words = [f"hydra/launcher={launcher}", "study=night", "results=results"]
        config = compose("config", words, return_hydra_config=True)
    node = config.hydra.launcher
    assert node._target_.startswith(f"hydra_plugins.hydra_{launchers.EXTRAS[launcher]}_launcher.")
    if "submitit_folder" in node:
        assert node.submitit_folder == "results/night/.submitit/%j"


def test_a_launcher_that_does_not_exist_gets_a_sentence_with_those_that_do() -> None:
    with pytest.raises(
        InputError, match=r"there is no hydra/launcher=worker: did you mean workers\? There are basic, "
    ):
        check(["hydra/launcher=worker"], multirun=True)
    with pytest.raises(InputError, match=r"there is no hydra/sweeper=best: there are basic"):
        check(["hydra/sweeper=best"], multirun=True)


def test_a_launcher_is_no_setting_of_a_run() -> None:
    needs_launcher("joblib")
    plain = check(["method=rtn"], multirun=True)
    assert check(["method=rtn", "hydra/launcher=workers", "hydra.launcher.n_jobs=3"], multirun=True) == plain

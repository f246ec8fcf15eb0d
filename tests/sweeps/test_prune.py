"""Making room: what is listed and removed, and above all what is not."""

import json
from pathlib import Path

import pytest

from runners.arguments import invoke
from runners.errors import InputError
from runners.prune.__main__ import main
from runners.results.metrics import METRICS
from runners.results.progress import Progress
from runners.results.run_folder import RunFolder

ENDINGS = {
    "rtn-3b-1": {"status": "done", "bits_per_weight": 3.0, "layers/mean_relative_error": 0.1, "bits": 3},
    "rtn-3b-2": {"status": "failed", "stage": "load", "error": "no", "reason": "exception"},
    "rtn-3b-3": {"status": "failed", "stage": "load", "error": "no", "reason": "interrupted"},
}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name, ending in ENDINGS.items():
        folder = tmp_path / "night" / "m" / name
        folder.mkdir(parents=True)
        (folder / METRICS).write_text(json.dumps({"method": "rtn", "model": "m"} | ending))
    Progress(tmp_path / "night" / "m" / "rtn-3b-4").stage = "quantize"
    (tmp_path / "night" / "m" / "rtn-3b-1" / "layers.csv.partial").write_text("x")
    for name, sent in {"offline-run-1": True, "offline-run-2": False}.items():
        (tmp_path / "night" / "wandb" / name).mkdir(parents=True)
        (tmp_path / "night" / "wandb" / name / ("run.wandb.synced" if sent else "run.wandb")).write_text("x")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a.safetensors").write_bytes(b"x" * 2_000_000)
    return tmp_path / "night"


def files(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"
    }


def prune(study: Path, *words: str) -> None:
    invoke([f"study={study.name}", f"results={study.parent}", *words], main)


def test_nothing_is_removed_unless_it_is_asked_for(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(study.parent)
    prune(study, "runs=all", "cache=true")
    printed = capsys.readouterr().out
    assert files(study.parent) == before
    assert "2.0 MB" in printed
    assert "delete=true removes them" in printed
    assert "offline-run-2" not in printed


RUNS = {
    "failures": {"rtn-3b-2"},
    "not_done": {"rtn-3b-2", "rtn-3b-3", "rtn-3b-4"},
    "all": {"rtn-3b-1", "rtn-3b-2", "rtn-3b-3", "rtn-3b-4"},
    "none": set(),
}


@pytest.mark.parametrize("which", RUNS)
def test_the_runs_that_are_asked_for_go_and_no_others(study: Path, which: str) -> None:
    prune(study, f"runs={which}", "delete=true")
    left = {folder.name for folder in (study / "m").iterdir()}
    assert left == {*ENDINGS, "rtn-3b-4"} - RUNS[which]
    assert [folder.name for folder in (study / "wandb").iterdir()] == ["offline-run-2"]  # which was not sent
    assert not list(study.rglob("*.partial"))
    assert (study.parent / "cache" / "a.safetensors").exists()


def test_a_run_that_a_process_works_on_stays(study: Path) -> None:
    with RunFolder(study / "m" / "rtn-3b-4").lock(wait=False):
        prune(study, "runs=all", "cache=true", "delete=true")
        assert [folder.name for folder in (study / "m").iterdir()] == ["rtn-3b-4"]
    assert not (study.parent / "cache").exists()


def test_what_a_link_leads_to_stays(study: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    kept = tmp_path / "elsewhere" / "weights"
    kept.write_text("x")
    (study / "m" / "rtn-3b-2" / "checkpoint").symlink_to(tmp_path / "elsewhere")
    (study / "m" / "linked").symlink_to(study / "m" / "rtn-3b-1")
    prune(study, "runs=all", "delete=true")
    assert kept.exists()
    assert (study / "m" / "linked").is_symlink()


def test_a_study_must_be_named_and_be_there(study: Path) -> None:
    with pytest.raises(InputError, match="missing: study"):
        invoke([f"results={study.parent}"], main)
    with pytest.raises(InputError, match="study must be the name of a folder"):
        invoke(["study=..", f"results={study}", "delete=true"], main)
    with pytest.raises(InputError, match="there is no study"):
        invoke(["study=nigt", f"results={study.parent}"], main)

"""Making room: what is listed and removed, and above all what is not."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from runners.arguments import invoke
from runners.errors import InputError
from runners.gguf_files import kept
from runners.prune.__main__ import main
from runners.results.metrics import METRICS
from runners.results.progress import Progress
from runners.results.run_folder import RunFolder
from runners.storage.locks import file_lock
from runners.tracking.store import Project
from tests.conftest import PROJECT

ENDINGS = {
    "rtn-3b-1": {"status": "done", "bits_per_weight": 3.0, "layers/mean_relative_error": 0.1, "bits": 3},
    "rtn-3b-2": {"status": "failed", "stage": "load", "error": "no", "reason": "exception"},
    "rtn-3b-3": {"status": "failed", "stage": "load", "error": "no", "reason": "interrupted"},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))


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


def prune_elsewhere(study: Path, *words: str) -> None:
    """In a process of its own, as trackio has one store a process."""
    command = [sys.executable, "-m", "runners.prune", f"study={study.name}", f"results={study.parent}", *words]
    subprocess.run(command, cwd=PROJECT, check=True)


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


@pytest.fixture
def converted(tmp_path: Path) -> dict[str, Path]:
    """Folders of converted models: of this version, of another one, and the part that a killed conversion has left."""
    (tmp_path / "m.gguf").write_text("x")
    current = kept.place_of(tmp_path / "m.gguf")
    other = current.with_name(current.name[:-8] + "0" * 8)
    folders = {"current": current, "other": other, "part": current.with_name(f"{current.name}.12.partial")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / kept.NOTE).write_text("{}")
        (folder / "model.safetensors").write_bytes(b"x" * 3_000_000)
    return folders


def test_models_converted_by_another_version_go_with_the_cache(
    study: Path, converted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    prune(study, "delete=true")
    assert all(folder.exists() for folder in converted.values())
    prune(study, "cache=true")
    assert capsys.readouterr().out.count("3.0 MB") == 2
    assert all(folder.exists() for folder in converted.values())
    prune(study, "cache=true", "delete=true")
    assert [name for name, folder in converted.items() if folder.exists()] == ["current"]
    assert not kept.lock_of(converted["other"]).exists()


def test_a_converted_model_that_a_process_reads_or_makes_stays(
    study: Path, converted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys, pathlib; from runners.gguf_files.kept import hold; hold(pathlib.Path(sys.argv[1])); print(); input()"
    command = [sys.executable, "-c", code, str(converted["other"])]
    with (
        subprocess.Popen(command, cwd=PROJECT, stdin=-1, stdout=-1) as reader,
        file_lock(kept.lock_of(converted["current"]), 0),  # as of a conversion
    ):
        assert reader.stdout is not None
        reader.stdout.readline()
        prune(study, "cache=true", "delete=true")
        reader.communicate(b"\n")
    assert all(folder.exists() for folder in converted.values())
    assert capsys.readouterr().out.count("kept: a process works on it") == 2
    prune(study, "cache=true", "delete=true")
    assert not converted["other"].exists()


DIGESTS = {"rtn 3 bits": "aaaaaaaaaa", "rtn 4 bits": "bbbbbbbbbb", "rtn 2 bits": "cccccccccc"}


@pytest.fixture
def tracked(study: Path) -> Project:
    """A store of three runs with a figure each: one is done, one has failed, and the folder of one is gone."""
    for name, status in {"rtn-3b-aaaaaaaaaa": "done", "rtn-4b-bbbbbbbbbb": "failed"}.items():
        ending = {
            "status": status,
            "method": "rtn",
            "model": "m",
            "reason": "exception",
            "stage": "load",
            "error": "no",
        }
        (study / "m" / name).mkdir()
        (study / "m" / name / METRICS).write_text(json.dumps(ending))
    project = Project(study)
    code = """
import sys, os, numpy, trackio
from trackio.run import Run
class Local(Run):
    def _get_username(self): return None
for name in sys.argv[2:]:
    for _ in range(2):  # made again: the first figure is of no use
        for old in [old for old in trackio.Api().runs(sys.argv[1]) if old.name == name] if _ else []:
            old.delete()
        run = Local(None, sys.argv[1], None, name)
        run.log({"ppl": 1.0, "figure": trackio.Image(numpy.zeros((8, 8, 3), numpy.uint8))})
        run.finish()
"""
    names = [f"{words} m · {digest}" for words, digest in DIGESTS.items()]
    environment = {"TRACKIO_DIR": str(project.store), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, project.name, *names]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    return project


@pytest.mark.skipif(find_spec("trackio") is None, reason='not installed: pip install "quantease-bench[dashboard]"')
def test_what_trackio_keeps_of_runs_that_are_gone_or_made_again_goes(
    study: Path, tracked: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(tracked.runs()) == 3
    assert len(tracked.unused_figures()) == 3
    before = files(study.parent)
    prune(study)
    listed = capsys.readouterr().out
    assert "a run that is gone, rtn 2 bits m · cccccccccc" in listed
    assert "a run that is gone, rtn 4 bits m · bbbbbbbbbb" in listed  # goes with its run, which has failed
    assert "aaaaaaaaaa" not in listed
    assert files(study.parent) == before
    prune_elsewhere(study, "delete=true")
    assert tracked.runs() == ["rtn 3 bits m · aaaaaaaaaa"]
    assert len([file for file in tracked.media.rglob("*") if file.is_file()]) == 1
    assert tracked.unused_figures() == []


@pytest.mark.skipif(find_spec("trackio") is None, reason='not installed: pip install "quantease-bench[dashboard]"')
def test_trackios_project_goes_with_the_last_run_of_its_study_also_where_the_study_is_gone(
    study: Path, tracked: Project
) -> None:
    with RunFolder(study / "m" / "rtn-3b-4").lock(wait=False):
        prune_elsewhere(study, "runs=all", "delete=true")
    assert tracked.database.exists()
    shutil.rmtree(study)
    prune_elsewhere(study, "delete=true")
    assert tracked.paths == []
    with pytest.raises(InputError, match="there is no study"):
        prune(study)


def test_a_store_that_cannot_be_read_is_named(study: Path) -> None:
    project = Project(study)
    project.store.mkdir()
    project.database.write_text("no database")
    with pytest.raises(InputError, match=rf"{project.database} cannot be read or written"):
        prune(study)


def test_a_database_is_read_without_trackio(study: Path) -> None:
    project = Project(study)
    project.store.mkdir()
    with closing(sqlite3.connect(project.database)) as made:
        made.executescript(
            "CREATE TABLE metrics (run_name TEXT, metrics TEXT); CREATE TABLE configs (run_name TEXT);"
            """INSERT INTO metrics VALUES ('a', '{"figure": {"file_path": "night/a/0/1.png"}}');"""
            "INSERT INTO configs VALUES ('b')"
        )
    for name in ("a/0/1.png", "a/0/2.png", "b/0/3.png"):  # b has logged nothing of its figure yet
        (project.media / name).parent.mkdir(parents=True, exist_ok=True)
        (project.media / name).write_text("x")
    assert project.runs() == ["a", "b"]
    assert [file.name for file in project.unused_figures()] == ["2.png"]

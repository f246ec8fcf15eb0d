"""Sending offline runs: which, once, and what is said; W&B's command is replaced by one that needs no account."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import wandb

from runners import sync
from runners.arguments import invoke
from runners.errors import InputError
from runners.run.experiment import run_cell
from runners.tracking import wandb_server
from tests.conftest import ToySettings

FAKE = """
import os, sys, pathlib
folders = [pathlib.Path(argument) for argument in sys.argv[1:] if "offline-run" in argument]
for folder in folders:
    if "refused" not in folder.name:
        (folder / "run.wandb.synced").touch()
pathlib.Path(os.environ["LOG"]).write_text(f"{sys.argv[1]} {len(folders)} {os.environ['WANDB_DATA_DIR']}")
"""


def make_run(study: Path, time: str, name: str, ended: bool = True) -> Path:
    folder = study / "wandb" / f"offline-run-20260101_{time}-{name}-{study.name}"
    folder.mkdir(parents=True)
    (folder / "run.wandb").write_bytes(b":W&B\xd4\xee\x00" + bytes(100))
    if ended:
        (study / "toy" / name).mkdir(parents=True, exist_ok=True)
        (study / "toy" / name / "metrics.json").write_text("{}")
    return folder


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return tmp_path / "results" / "mine"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who is logged in, and where the command that would send their runs says what it was told."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(sync, "logged_in", lambda: True)
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sync, "WANDB", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def arguments(study: Path, *more: str) -> list[str]:
    return [f"study={study.name}", f"results={study.parent}", *more]


def test_only_ended_runs_are_sent_and_only_their_latest(study: Path) -> None:
    make_run(study, "000001", "rtn-3b-aaaaaaaaaa")
    again = make_run(study, "000002", "rtn-3b-aaaaaaaaaa")
    make_run(study, "000003", "gptq-3b-bbbbbbbbbb", ended=False)
    sent = make_run(study, "000004", "awq-3b-cccccccccc")
    (sent / "run.wandb.synced").touch()
    folders, left_out = sync.pending(study)
    assert folders == [again]
    assert left_out == {"made again later": 1, "not ended yet": 1, "sent before": 1}


@pytest.mark.parametrize("content", [b"", b":W&B\xd4\xee\x00", None], ids=["no bytes", "a header", "no file"])
def test_what_is_empty_is_skipped_in_a_sentence(
    content: bytes | None, study: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "rtn-3b-aaaaaaaaaa"
    kept = make_run(study, "000001", name)
    empty = make_run(study, "000002", name)  # later than the other of its cell, and does not replace it
    (empty / "run.wandb").unlink()
    if content is not None:
        (empty / "run.wandb").write_bytes(content)
    assert sync.pending(study)[0] == [kept]
    invoke(arguments(study), sync.main)  # without an error: there is nothing that could be sent
    assert "1 of 1 runs sent, 1 empty, as their process died at once" in capsys.readouterr().out
    assert log.read_text().startswith("sync 1 ")


def test_a_second_attempt_is_a_run_of_its_cell(study: Path) -> None:
    first = make_run(study, "000001", "rtn-3b-aaaaaaaaaa")
    second = first.with_name("offline-run-20260101_000002-rtn-3b-aaaaaaaaaa-mine-attempt-1")
    shutil.copytree(first, second)
    folders, left_out = sync.pending(study)
    assert folders == [second]
    assert left_out == {"made again later": 1}


def test_runs_are_sent_once(study: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("rtn-3b-aaaaaaaaaa", "gptq-3b-bbbbbbbbbb")):
        make_run(study, f"00000{number}", name)
    invoke(arguments(study), sync.main)
    assert log.read_text() == f"sync 2 {study / 'wandb' / 'data'}"
    assert "2 of 2 runs sent" in capsys.readouterr().out
    log.unlink()
    invoke(arguments(study), sync.main)
    assert not log.exists()
    assert "0 of 0 runs sent, 2 sent before" in capsys.readouterr().out


def test_what_was_not_sent_is_named(study: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(study, "000001", "rtn-3b-aaaaaaaaaa")
    refused = make_run(study, "000002", "refused-3b-bbbbbbbbbb")
    with pytest.raises(SystemExit, match="error: 1 runs were not sent; the same command again tries only those"):
        invoke(arguments(study), sync.main)
    shown = capsys.readouterr().out
    assert f"not sent: {refused}" in shown
    assert "1 of 2 runs sent" in shown


def test_a_dry_run_sends_nothing(study: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(study, "000001", "rtn-3b-aaaaaaaaaa")
    invoke(arguments(study, "dry_run=true"), sync.main)
    assert capsys.readouterr().out == f"{folder}\n1 runs would be sent\n"
    assert not log.exists()


def test_without_credentials_nothing_is_tried(study: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(study, "000001", "rtn-3b-aaaaaaaaaa")
    monkeypatch.setattr(sync, "logged_in", wandb_server.logged_in)
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    with pytest.raises(InputError, match="run wandb login, or set WANDB_API_KEY"):
        invoke(arguments(study), sync.main)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(InputError, match="WANDB_MODE=offline keeps W&B from sending anything"):
        invoke(arguments(study), sync.main)
    assert not log.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["stdy=x"], "stdy is not a setting: did you mean study\\? There are study, results, dry_run"),
        (["dry_run=yes"], "dry_run: must be true or false, not 'yes'"),
        (["study=other"], "other is not the folder of a study"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(study: Path, more: list[str], message: str) -> None:
    study.mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        invoke(arguments(study, *more), sync.main)


def test_a_study_without_offline_runs_is_not_one_to_send(study: Path) -> None:
    study.mkdir(parents=True)
    with pytest.raises(InputError, match="has no offline runs"):
        sync.pending(study)


def test_a_real_run_is_found_and_wandbs_own_command_takes_it(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = toy_settings("method=rtn", "tracker=wandb", "study=real")
    run_cell(settings)
    (folder,), _ = sync.pending(settings.study_folder)
    assert settings.run_name in folder.name
    command = [*sync.WANDB, "sync", "-n", str(sync.PARALLEL_UPLOADS), "--dry-run", str(folder)]
    said = subprocess.run(command, capture_output=True, check=True, cwd=settings.study_folder, timeout=300)
    assert "Would sync 1 run(s)" in said.stderr.decode()

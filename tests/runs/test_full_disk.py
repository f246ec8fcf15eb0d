"""A disk that is full, over its quota or broken interrupts a run: nothing is lost, and the same command goes on with it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runners.config.command_line import check
from runners.quantization.finished_blocks import delete_finished_blocks
from runners.results.metrics import METRICS
from runners.results.progress import PROGRESS, Progress
from runners.run import experiment, kept_codes
from runners.run.experiment import run_cell, run_experiment
from tests.conftest import PROJECT, ToySettings


def break_disk(monkeypatch: pytest.MonkeyPatch, name: str, number: int) -> None:
    """Let the disk fail for files whose path has this name in it."""
    fsync = os.fsync

    def fail(descriptor: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
def test_a_run_without_room_is_interrupted_and_goes_on(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    settings = toy_settings("method=rtn")
    break_disk(monkeypatch, "block-00001", number)
    row = run_cell(settings)
    assert (row["status"], row["reason"], row["stage"]) == ("failed", "interrupted", "quantize")
    folder = settings.folder / "checkpoint"
    assert row["error"] == (
        f"{folder / 'block-00001.safetensors'} cannot be written ({os.strerror(number)}): make room in {folder}, and the "
        "same command again goes on"
    )
    assert [file.name for file in sorted(folder.glob("block-*"))] == ["block-00000.json", "block-00000.safetensors"]
    monkeypatch.undo()
    assert run_cell(settings)["status"] == "done"


def test_a_library_without_room_interrupts_a_run_as_well(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "library" / "file"))

    monkeypatch.setattr(experiment, "preflight", fail)
    row = run_cell(toy_settings("method=rtn"))
    assert (row["reason"], row["stage"]) == ("interrupted", "preflight")
    assert row["error"].endswith(f": make room in {tmp_path / 'library'}, and the same command again goes on")


def test_a_cache_without_room_fails_no_run(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_disk(monkeypatch, "/cache/", errno.ENOSPC)
    settings = toy_settings("method=rtn", "calibration.inputs=full_precision")
    assert run_cell(settings)["status"] == "done"
    assert "is not kept for other runs" in caplog.text
    assert not list((tmp_path / "results" / "cache").glob("*.partial"))


class Killed(BaseException):
    """What no code expects, as a kill is."""


def test_what_a_kill_leaves_of_a_run_that_is_done_is_removed_by_the_next_command(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=rtn", "keep_checkpoint=never")

    def die(_folder: Path) -> None:
        raise Killed

    monkeypatch.setattr(kept_codes, "delete_finished_blocks", die)
    with pytest.raises(Killed):
        run_cell(settings)
    assert (settings.folder / METRICS).exists()
    assert (settings.folder / "checkpoint").exists()
    monkeypatch.undo()
    assert run_cell(settings)["skipped"]
    assert not (settings.folder / "checkpoint").exists()
    assert not (settings.folder / PROGRESS).exists()
    assert kept_codes.delete_finished_blocks is delete_finished_blocks


def test_a_checkpoint_that_is_to_be_kept_is_no_leftover(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", "keep_checkpoint=true")
    run_cell(settings)
    Progress(settings.folder).stage = "zero-shot"  # killed before it could remove that
    assert run_cell(settings.replace(keep_checkpoint=False))["skipped"]
    assert (settings.folder / "checkpoint").exists()
    assert not (settings.folder / PROGRESS).exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes; 60 kB of it are free."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2048k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only root may mount a small disk")
    (disk / "fill").write_bytes(bytes((2048 - 60) * 1024))
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)  # this process may still have a file open there


def test_a_sweep_on_a_full_disk_says_so_once_and_goes_on_when_there_is_room(
    small_disk: Path, toy_model: Path, data_root: Path
) -> None:
    toy = ["model=local", f"model.path={toy_model}", "calibration.num_sequences=4", "evaluation=wikitext2"]
    sweep = [
        "-m",
        "method=rtn",
        "bits=3,4",
        "tracker=none",
        f"data_root={data_root}",
        f"results={small_disk / 'results'}",
    ]
    command = [sys.executable, "run.py", *toy, *sweep]
    full = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert full.returncode == 1
    assert "Logging error" not in full.stdout + full.stderr
    assert "Traceback" not in full.stdout + full.stderr
    assert "(No space left on device): make room in " in full.stdout
    assert "2 of 2 cells have not ended: the same command again goes on with them" in full.stdout
    (small_disk / "fill").unlink()
    for cell in check([*toy, *sweep[1:]], multirun=True):  # in this process, which has imported everything
        assert run_experiment(cell)[-1]["status"] == "done"
    rows = [json.loads(file.read_text()) for file in small_disk.glob("results/runs/toy/*/metrics.json")]
    assert [row["status"] for row in rows] == ["done"] * 3
    assert not list(small_disk.glob("results/runs/toy/*/checkpoint/*.partial"))

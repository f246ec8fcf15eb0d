"""Locks: held against other processes, and refused where the kernel does not keep them."""

import errno
import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from runners.errors import InputError
from runners.run.experiment import run_cell
from runners.storage import locks
from runners.storage.locks import acquire, file_lock, kernel_lock
from runners.sweeps.gpus import lease
from tests.conftest import ToySettings


@pytest.fixture(params=locks.NO_LOCKS, ids=errno.errorcode.get)
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as far as a process can tell."""

    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock", 0) as is_mine:
        assert is_mine
        with file_lock(tmp_path / "lock", 0) as is_mine_too:
            assert not is_mine_too
    with file_lock(tmp_path / "lock", 0) as is_mine:
        assert is_mine


@pytest.mark.usefixtures("no_flock")
def test_a_file_system_without_locks_is_refused_in_a_sentence(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    file = tmp_path / "lock"
    said = rf"{file} cannot be locked: its file system has no locks \(.+\), .+: set results=FOLDER, on a file system"
    for _ in range(2):  # what the first has left does not make the second wait for it
        with pytest.raises(InputError, match=said), file_lock(file, -1):
            pytest.fail("it was locked")
    assert not recwarn.list  # filelock warns where it falls back to a lock that does not end with its process


def test_a_lock_that_has_turned_soft_is_refused_and_released(tmp_path: Path) -> None:
    lock = filelock.SoftFileLock(tmp_path / "lock")
    with pytest.raises(InputError, match="its file system has no locks"):
        acquire(lock, -1)
    assert not lock.is_locked
    assert not (tmp_path / "lock").exists()


def test_versions_without_the_option_are_not_given_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(filelock.FileLock):
        def __init__(self, lock_file: Any) -> None:
            super().__init__(lock_file)

    monkeypatch.setattr(locks, "FileLock", Old)
    assert acquire(kernel_lock(tmp_path / "lock"), 0)


@pytest.mark.usefixtures("no_flock")
def test_a_run_and_a_gpu_are_refused_alike(
    toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = toy_settings("method=rtn")
    with pytest.raises(InputError, match=r"has no locks.*results=FOLDER"):
        run_cell(settings)
    assert not (settings.folder / "metrics.json").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"quantease-gpus-.+has no locks.*TMPDIR=FOLDER"), lease(None):
        pytest.fail("it was leased")

"""A checkout and a HOME that cannot be written to: a run needs nothing but its results folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PROJECT, ToySettings

READ_ONLY = """
set -e
for folder in "$1" "$2"; do mount --bind "$folder" "$folder"; mount -o remount,ro,bind "$folder"; done
cd "$1"; export HOME="$2"; shift 2; exec "$@"
"""
UNSHARE = ["unshare", "--mount", "--map-root-user"]


def run_read_only(checkout: Path, home: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a checkout, with a HOME, neither of which it can write to, not even as root."""
    home.mkdir(exist_ok=True)
    caches = (
        "XDG_CACHE_HOME",
        "NUMBA_CACHE_DIR",
        "MPLCONFIGDIR",
        "WANDB_CACHE_DIR",
        "WANDB_DATA_DIR",
        "WANDB_CONFIG_DIR",
    )
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    inside = ["bash", "-c", READ_ONLY, "-", str(checkout), str(home), *command]
    return subprocess.run(
        [*UNSHARE, *inside],
        env=environment | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a run needs, as mounts of the checkout itself could be seen by others."""
    copy = tmp_path / "checkout"
    for part in ("conf", "quantease", "baselines", "runners"):
        shutil.copytree(PROJECT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "run.py", copy)
    if shutil.which("unshare") is None:
        pytest.skip("no unshare: nothing can be mounted read-only for one process")
    tried = run_read_only(
        copy, tmp_path / "home", "sh", "-c", "! touch here 2>/dev/null && ! touch $HOME/here 2>/dev/null"
    )
    if tried.returncode != 0:
        pytest.skip(f"nothing can be mounted read-only here: {tried.stderr.strip() or 'it can be written to'}")
    return copy


def test_a_run_needs_nothing_but_its_results_folder(checkout: Path, tmp_path: Path, toy_settings: ToySettings) -> None:
    settings = toy_settings("method=quantease")
    run = (f"model.path={settings.run.model.path}", "model=local", f"data_root={settings.execution.data_root}")
    short = ("calibration=c4", "calibration.num_sequences=4", "evaluation=wikitext2", "method.num_iters=2")
    tracked = f"results={tmp_path / 'results'}", "tracker=wandb", "tracker.mode=offline"
    command = [sys.executable, "run.py", *run, *short, *tracked, "method=quantease"]
    answer = run_read_only(checkout, tmp_path / "home", *command)
    assert answer.returncode == 0, answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr
    assert "ERROR main" not in answer.stderr  # the log of W&B's own process, which has no place for it
    assert len(list(tmp_path.glob("results/runs/*/quantease-3b-*/metrics.json"))) == 1
    assert len(list(tmp_path.glob("results/runs/wandb/offline-run-*/*.wandb"))) == 2


def test_compiled_code_is_kept_where_it_can_be(checkout: Path) -> None:
    code = "from quantease.kernels import cpu; print(cpu._run.stats.cache_path)"  # None without a cache
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    command = [sys.executable, "-c", code]
    kept = subprocess.run(command, cwd=checkout, env=environment | {"PYTHONPATH": str(checkout)}, capture_output=True)
    assert kept.stdout.decode().strip() == str(checkout / "quantease" / "kernels" / "__pycache__"), kept.stderr
    answer = run_read_only(checkout, checkout.with_name("home"), *command)
    assert (answer.stdout.strip(), answer.returncode) == ("None", 0), answer.stderr

"""A sweep without an end, started as a user would, and launchers that need not be installed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from tests.conftest import PROJECT, missing
from tests.problems import random_problem
from tests.sweeps.endless import StartSweep


def needs_launcher(extra: str) -> None:
    """Skip where Hydra's launcher of an extra is not installed."""
    pytest.importorskip(f"hydra_plugins.hydra_{extra}_launcher", reason=missing(f"hydra-{extra}-launcher"))


@pytest.fixture
def start_endless_sweep(toy_model: Path, data_root: Path, tmp_path: Path) -> Iterator[StartSweep]:
    """Starts a sweep of two cells that would take years, with its output to where it is told; ends what is left of it."""
    QuantEase(num_iters=3).solve(random_problem(), GridSpec(3))  # numba's code is on disk: no sweep has to compile it
    toy = ["model=local", f"model.path={toy_model}", "calibration.num_sequences=4", "evaluation=wikitext2"]
    endless = ["method=quantease", "method.num_iters=1000000000", "bits=3,4", "tracker=none", "-m"]
    arguments = [*toy, f"data_root={data_root}", f"results={tmp_path}", *endless]
    started: list[subprocess.Popen[str]] = []

    def start(output: int, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(PROJECT / "run.py"), *arguments, *more]
        # Of tests in the background of a script Ctrl-C is ignored, and what they start inherits that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        sweep = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=output, text=True, start_new_session=True)
        signal.signal(signal.SIGINT, before)
        started.append(sweep)
        return sweep

    yield start
    for sweep in started:
        with suppress(ProcessLookupError):
            os.killpg(sweep.pid, signal.SIGKILL)

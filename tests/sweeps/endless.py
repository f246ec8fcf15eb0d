"""Sweeps of two cells that would take years: what becomes of them when somebody ends them."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from runners.results.progress import PROGRESS, read_progress

StartSweep = Callable[..., subprocess.Popen[str]]  # of where its output goes, and more settings


def wait_for(happened: Callable[[], bool], seconds: float = 600) -> None:
    """Wait until something has happened.

    Raises:
        AssertionError: it has not within the time.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.2)


def quantizing(study: Path) -> list[Path]:
    """The folders of runs that are at work on their layers."""
    found = [file.parent for file in study.glob(f"toy/*/{PROGRESS}")]
    return [folder for folder in found if (read_progress(folder) or {}).get("stage") == "quantize"]


def session(leader: int) -> list[str]:
    """The living processes of a session, by their command lines; of a sweep they are all that it has started."""
    listed = subprocess.run(
        ["ps", "-ww", "-o", "stat=,args=", "-s", str(leader)], capture_output=True, text=True
    ).stdout
    return [line for line in listed.splitlines() if not line.startswith("Z")]

"""Seconds and peak memory of a stage, and what machine it ran on."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from runners.project import ROOT

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "hydra-core",
    "wandb",
    "lm-eval",
    "numpy",
    "numba",
    "triton",
)


def clock(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Meter:
    """`with Meter(device) as meter: ...`, then `meter.seconds` and `meter.peak_memory_gb`.

    The memory is the GPU's where the work is on one, else the process's; in units of 10^9 bytes.
    """

    seconds: float = 0.0
    peak_memory_gb: float = 0.0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "Meter":
        if self._device.type == "cuda":
            clock(self._device)  # what is still under way is not this stage's
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_peak()
        self._start = clock(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = clock(self._device) - self._start
        peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak()
        self.peak_memory_gb = peak / 1e9


class Phases:
    """Seconds by what they were spent on, after the device has done what it was given: `with phases.of("solve"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time until its end to what has the name."""
        start = clock(self._device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + clock(self._device) - start


def _reset_peak() -> None:
    """Let the kernel forget the process's peak so far, where it can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    """The peak resident memory of this process in bytes, since the last reset where there is one."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device) -> dict[str, Any]:
    """What a number may depend on beside the settings: code, libraries, machine."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "versions": versions(),
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def versions() -> dict[str, str | None]:
    """Of the libraries that a number may depend on; None: not installed."""
    return {name: _version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _git(*arguments: str) -> str | None:
    """The answer of git about the project's checkout; None where it is not one."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

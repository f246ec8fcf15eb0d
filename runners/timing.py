"""Seconds and peak memory of stages and phases.

A GPU works asynchronously: a call returns before its work is done. Every reading waits for the device first.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


def clock(device: torch.device) -> float:
    """The time in seconds, read after the device has finished all work submitted so far."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Meter:
    """Measures a stage: `with Meter(device) as meter: ...`, then `meter.seconds` and `meter.peak_memory_gb`.

    Memory is that of the GPU where the device is one, else that of the process; in units of 10^9 bytes.
    """

    seconds: float = 0.0
    peak_memory_gb: float = 0.0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> "Meter":
        if self._device.type == "cuda":
            clock(self._device)  # work submitted before belongs to the stage before
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_peak()
        self._start = clock(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = clock(self._device) - self._start
        self.peak_memory_gb = peak_so_far_gb(self._device)


def peak_so_far_gb(device: torch.device) -> float:
    """The peak memory since the last `Meter` began, as it measures it: within a stage, which may yet be killed."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak()
    return peak / 1e9


class Phases:
    """Seconds per phase, where phases alternate: `with phases.of("solve"): ...` adds to what `solve` has taken so far."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Add the time that the context takes to the phase's seconds, also where it ends in an exception."""
        start = clock(self._device)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + clock(self._device) - start


def _reset_peak() -> None:
    """Reset the kernel's record of the process's peak memory (Linux; elsewhere the peak is that since the start)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5: reset the peak resident size, see proc(5)


def _peak() -> int:
    """The peak resident memory of this process in bytes, since the last reset; 0 where the system does not tell."""
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
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB

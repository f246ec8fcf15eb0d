"""Seconds and peak memory, measured after the device has done what it was given."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


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

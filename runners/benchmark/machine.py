"""What the machine was measured to do, and the least time that a sweep can take at these rates."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantease.matmul import product
from runners.timing import clock

SAMPLE_SECONDS = 0.05  # of one measurement: far above what the clock and a kernel launch are uncertain by


def seconds(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Seconds per call: the median of `repeats` measurements, each of as many calls as fill SAMPLE_SECONDS.

    The calls before the first measurement are not counted: they compile kernels, allocate memory and raise the clock.
    """
    calls = max(1, round(SAMPLE_SECONDS / _time(function, device, 1)))
    _time(function, device, calls)
    return statistics.median(_time(function, device, calls) for _ in range(repeats)) / calls


def _time(function: Callable[[], object], device: torch.device, calls: int) -> float:
    start = clock(device)
    for _ in range(calls):
        function()
    return clock(device) - start


@dataclass(frozen=True)
class Rates:
    """The rates of a machine.

    Attributes:
        float32: FLOP/s of a float32 matrix product.
        bfloat16: FLOP/s of a bfloat16 matrix product with float32 sums; None on a CPU, which sweeps in float32 alone.
        bandwidth: bytes/s of a copy, read and write counted.
    """

    float32: float
    bfloat16: float | None
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device) -> "Rates":
        """Measure a device, with matrices and a copy that are too large for its caches; seconds of work."""
        size = 8192 if device.type == "cuda" else 1536
        a = torch.randn(size, size, device=device)
        flop = 2 * size**3
        float32 = flop / seconds(lambda: a @ a, device)
        halves = a.bfloat16()
        bfloat16 = flop / seconds(lambda: product(halves, halves), device) if device.type == "cuda" else None
        large = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
        target = torch.empty_like(large)
        bandwidth = 2 * large.numel() * 4 / seconds(lambda: target.copy_(large), device)
        return cls(float32, bfloat16, bandwidth)

    def floor(self, out_features: int, in_features: int, splits: bool) -> float:
        """The least seconds of a sweep: the product D H, or reading and writing everything once, whichever takes longer.

        Args:
            splits: the product is computed as three products of bfloat16.
        """
        rate = self.bfloat16 / 3 if splits and self.bfloat16 else self.float32
        moved = 4 * (
            in_features**2 + 4 * in_features * out_features
        )  # bytes: H is read; W_hat and D are read and written
        return max(2 * out_features * in_features**2 / rate, moved / self.bandwidth)

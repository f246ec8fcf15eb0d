"""The machine's measured rates, and the least time that they leave a sweep."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantease.matmul import product
from runners.timing import clock

MOMENT = 0.05  # seconds


def seconds(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The median time of `run`, of as many calls in a row as take a moment, after calls that are not counted."""
    calls = max(1, round(MOMENT / _time(run, device, 1)))
    _time(run, device, calls)
    return statistics.median(_time(run, device, calls) for _ in range(repeats)) / calls


def _time(run: Callable[[], object], device: torch.device, calls: int) -> float:
    start = clock(device)
    for _ in range(calls):
        run()
    return clock(device) - start


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do.

    Attributes:
        float32: FLOP/s of a float32 matrix product.
        bfloat16: FLOP/s of a bfloat16 matrix product with float32 sums; None where there are no tensor cores.
        bandwidth: bytes/s of a copy, read and written.
    """

    float32: float
    bfloat16: float | None
    bandwidth: float

    @classmethod
    def measure(cls, device: torch.device) -> "Rates":
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
        """Seconds that no sweep can do without: D H at the rate of its products, or everything read and written once.

        Args:
            splits: the product is made as three of bfloat16 halves.
        """
        rate = self.bfloat16 / 3 if splits and self.bfloat16 else self.float32
        moved = 4 * (in_features**2 + 4 * in_features * out_features)  # H; W_hat and D, read and written
        return max(2 * out_features * in_features**2 / rate, moved / self.bandwidth)


def layer(out_features: int, in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and the Hessian of correlated inputs of very unequal size."""
    g = torch.Generator(device=device).manual_seed(0)
    rank = max(32, in_features // 4)
    mixing = torch.randn(rank, in_features, generator=g, device=device) / rank**0.5
    sizes = torch.logspace(0, -1.5, in_features, device=device)
    tokens = 2 * in_features
    x = torch.randn(tokens, rank, generator=g, device=device) @ mixing
    x += 0.5 + 0.3 * torch.randn(tokens, in_features, generator=g, device=device)
    x *= sizes[torch.randperm(in_features, generator=g, device=device)]
    return 0.02 * torch.randn(out_features, in_features, generator=g, device=device), x.T @ x / tokens

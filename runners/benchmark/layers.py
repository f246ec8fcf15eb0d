"""Single layers with the shapes of OPT: a sweep of QuantEase against the column-by-column form, GPTQ and the floor."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from baselines.gptq import GPTQ
from quantease import sweeps
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem
from runners.benchmark.column_by_column import ColumnByColumn
from runners.benchmark.machine import Rates, seconds

WIDTHS = {  # hidden size by model (OPT, Zhang et al., 2022, https://arxiv.org/abs/2205.01068, Table 1)
    "125m": 768,
    "350m": 1024,
    "1.3b": 2048,
    "2.7b": 2560,
    "6.7b": 4096,
    "13b": 5120,
    "30b": 7168,
    "66b": 9216,
}
SPEC = GridSpec(3)  # the papers' main setting: 3 bits, per-channel
COLUMNS = 1024  # that the column-by-column form is timed on; every column costs the same, and all would take minutes


def shapes(largest: int) -> Iterator[tuple[str, int, int]]:
    """Model, out and in features: a square layer of the bundled model; attention, fc1 and fc2 of each OPT up to a width."""
    yield "tiny", 192, 192
    for name, width in WIDTHS.items():
        if width <= largest:
            yield from ((name, width, width), (name, 4 * width, width), (name, width, 4 * width))


def measure_layer(name: str, out_features: int, in_features: int, rates: Rates, device: torch.device) -> dict[str, Any]:
    """One row of `layers.csv`.

    Times are in seconds, `times_*` are ratios. `memory_in_weights` is the peak of a whole solve without the weight and
    the Hessian, in units of the float32 weight; None on a CPU.
    """
    problem = LayerProblem(*random_layer(out_features, in_features, device))
    sweep, splits = _sweep(problem, device)
    column_by_column = _column_by_column(problem, device)
    floor = rates.floor(out_features, in_features, splits)
    before = _reset_peak_memory(device)
    quantease = seconds(lambda: QuantEase().solve(problem, SPEC), device, repeats=1)
    peak = torch.cuda.max_memory_allocated(device) if before is not None else 0
    return {
        "model": name,
        "out_features": out_features,
        "in_features": in_features,
        "sweep": sweep,
        "column_by_column": column_by_column,
        "times_column_by_column": column_by_column / sweep,
        "floor": floor,
        "times_floor": sweep / floor,
        "quantease_30_sweeps": quantease,
        "gptq": seconds(lambda: GPTQ().solve(problem, SPEC), device, repeats=1),
        "memory_in_weights": None if before is None else (peak - before) / (4 * problem.weight.numel()),
        "products": "bfloat16 x 3" if splits else "float32",
    }


def random_layer(out_features: int, in_features: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight (out, in) and Hessian (in, in), the same on every call with a seed.

    The Hessian is that of inputs as layers see them: correlated, with a mean that is not zero, and with columns whose size
    spans a factor of 30.
    """
    g = torch.Generator(device=device).manual_seed(seed)
    rank = max(32, in_features // 4)
    mixing = torch.randn(rank, in_features, generator=g, device=device) / rank**0.5
    norms = torch.logspace(0, -1.5, in_features, device=device)
    tokens = 2 * in_features  # enough that the Hessian has full rank
    x = torch.randn(tokens, rank, generator=g, device=device) @ mixing
    x += 0.5 + 0.3 * torch.randn(tokens, in_features, generator=g, device=device)
    x *= norms[torch.randperm(in_features, generator=g, device=device)]
    return 0.02 * torch.randn(out_features, in_features, generator=g, device=device), x.T @ x / tokens


def _sweep(problem: LayerProblem, device: torch.device) -> tuple[float, bool]:
    """Seconds of a rounded sweep, and whether its products are split into three of bfloat16."""
    grid, target = problem.fit_grid(SPEC), problem.weight.T
    w_hat = target.contiguous()
    residual = sweeps.Residual(target, w_hat)
    return seconds(lambda: sweeps.sweep(w_hat, target, residual, problem.hessian, grid), device), residual.splits


def _column_by_column(problem: LayerProblem, device: torch.device) -> float:
    """Seconds of the same sweep in the form of the authors' release, in proportion to the columns that were timed."""
    slow = ColumnByColumn(problem, UniformGrid.fit(problem.weight, SPEC))
    count = problem.weight.shape[1]
    columns = min(COLUMNS, count)
    return seconds(lambda: slow.sweep(True, columns), device, repeats=1) * count / columns


def _reset_peak_memory(device: torch.device) -> int | None:
    """Start to record the peak on a GPU; returns the bytes in use now, which belong to the problem. None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)

"""The layers of OPT, one at a time: a sweep of QuantEase against the column-by-column walk, GPTQ and the floor."""

from collections.abc import Iterator
from typing import Any

import torch

from baselines.gptq import GPTQ
from quantease import sweeps
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerProblem
from runners.benchmark.column_by_column import ColumnByColumn
from runners.benchmark.machine import Rates, layer, seconds

WIDTHS = {  # of the models of OPT (https://arxiv.org/abs/2205.01068)
    "125m": 768,
    "350m": 1024,
    "1.3b": 2048,
    "2.7b": 2560,
    "6.7b": 4096,
    "13b": 5120,
    "30b": 7168,
    "66b": 9216,
}
SPEC = GridSpec(3)
COLUMNS = 1024  # that the column-by-column walk is timed on; the time of all is in proportion


def shapes(largest: int) -> Iterator[tuple[str, int, int]]:
    """Model, out and in: the bundled model's square layer, then attention, fc1 and fc2 of each OPT up to a width."""
    yield "tiny", 192, 192
    for name, width in WIDTHS.items():
        if width <= largest:
            yield from ((name, width, width), (name, 4 * width, width), (name, width, 4 * width))


def measure(name: str, out_features: int, in_features: int, rates: Rates, device: torch.device) -> dict[str, Any]:
    """One row of `layers.csv`. Times are in seconds; `times_*` are ratios; memory is beside the weight and the Hessian."""
    problem = LayerProblem(*layer(out_features, in_features, device))
    sweep, splits = _sweep(problem, device)
    column = _column_by_column(problem, device)
    floor = rates.floor(out_features, in_features, splits)
    before = _memory(device)
    quantease = seconds(lambda: QuantEase().solve(problem, SPEC), device, 1)
    peak = torch.cuda.max_memory_allocated(device) if before is not None else 0
    return {
        "model": name,
        "out_features": out_features,
        "in_features": in_features,
        "sweep": sweep,
        "column_by_column": column,
        "times_column_by_column": column / sweep,
        "floor": floor,
        "times_floor": sweep / floor,
        "quantease_30_sweeps": quantease,
        "gptq": seconds(lambda: GPTQ().solve(problem, SPEC), device, 1),
        "memory_in_weights": None if before is None else (peak - before) / (4 * problem.weight.numel()),
        "products": "bfloat16 x 3" if splits else "float32",
    }


def _sweep(problem: LayerProblem, device: torch.device) -> tuple[float, bool]:
    """Seconds of a rounded sweep, and whether its products are made of bfloat16 halves."""
    grid, target = problem.fit_grid(SPEC), problem.weight.T
    w_hat = target.contiguous()
    residual = sweeps.Residual(target, w_hat)
    return seconds(lambda: sweeps.sweep(w_hat, target, residual, problem.hessian, grid), device), residual.splits


def _column_by_column(problem: LayerProblem, device: torch.device) -> float:
    walk = ColumnByColumn(problem, problem.fit_grid(SPEC))
    count = problem.weight.shape[1]
    columns = min(COLUMNS, count)
    return seconds(lambda: walk.sweep(True, columns), device, 1) * count / columns


def _memory(device: torch.device) -> int | None:
    """What is in use on a GPU now, from which its peak is counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)

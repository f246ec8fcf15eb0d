"""Quantize a model: block by block, on what the already quantized blocks feed the next one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, Unsupported
from runners.blocks import LinearLayer, Walk, hessians, linear_layers, shared_inputs
from runners.errors import InputError


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer: a row of `layers.csv`.

    Attributes:
        relative_error: ||W X - W_hat X||^2 / ||W X||^2, of W_hat as it stands in the model.
        seconds: spent in the solver.
        damping: what was really added to the Hessian's diagonal, as a fraction of its mean; None: nothing.
    """

    block: int
    layer: str
    out_features: int
    in_features: int
    relative_error: float
    seconds: float
    bits_per_weight: float
    damping: float | None
    dead_columns: int
    notes: str


@torch.no_grad()
def quantize(
    model: Any,
    sequences: Tensor,
    solver: LayerSolver,
    spec: GridSpec,
    *,
    true_sequential: bool,
    batch_size: int,
    report: Callable[[LayerRecord], None],
) -> list[LayerRecord]:
    """Replace the weights of every linear layer of every block by quantized ones.

    Args:
        sequences: calibration token ids (sequences, length).
        true_sequential: see `runners.settings.Calibration`.
        report: called with each layer as it is finished.

    Raises:
        Unsupported: the method cannot do what `spec` asks.
        InputError: activations or solutions are not finite.
    """
    walk = Walk(model, sequences, batch_size)
    records = []
    for index in range(len(walk.blocks)):
        groups = shared_inputs(walk, index)
        layers = linear_layers(walk.blocks[index])
        for passed in [[group] for group in groups] if true_sequential else [groups]:
            for group, hessian in zip(passed, hessians(walk, index, passed), strict=True):
                for name in group:
                    record = _solve(layers[name], hessian, solver, spec, index, name)
                    records.append(record)
                    report(record)
        walk.advance(index)
    return records


def _solve(
    layer: LinearLayer, hessian: Tensor, solver: LayerSolver, spec: GridSpec, block: int, name: str
) -> LayerRecord:
    problem = LayerProblem(layer.weight.to(torch.float32, copy=True), hessian)  # a copy: the module's is overwritten
    start = _clock(hessian)
    try:
        answer = solver.solve(problem, spec)
    except Unsupported as error:
        raise Unsupported(f"{name} in block {block}: {error}") from error
    seconds = _clock(hessian) - start
    layer.replace(answer.weight)
    used = layer.weight.float()  # in the model's dtype, so with its rounding
    if not torch.isfinite(used).all():
        raise InputError(f"{type(solver).__name__} gave weights that are not finite for {name} in block {block}")
    return LayerRecord(
        block=block,
        layer=name,
        out_features=problem.weight.shape[0],
        in_features=problem.weight.shape[1],
        relative_error=problem.relative_error(used),
        seconds=seconds,
        bits_per_weight=answer.bits_per_weight,
        damping=answer.damping,
        dead_columns=problem.dead_columns,
        notes="; ".join(answer.notes),
    )


def _clock(tensor: Tensor) -> float:
    """Seconds, after the device of `tensor` has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def bits_per_weight(records: list[LayerRecord]) -> float:
    """The mean over all quantized weights."""
    sizes = [record.out_features * record.in_features for record in records]
    return sum(s * record.bits_per_weight for s, record in zip(sizes, records, strict=True)) / sum(sizes)

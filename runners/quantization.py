"""Quantize a model: block by block, on what the already quantized blocks feed the next one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported, takes_rows_alone
from runners.blocks import LinearLayer, Walk, input_statistics, linear_layers, shared_inputs
from runners.errors import InputError
from runners.meter import Phases, clock


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer: a row of `layers.csv`.

    Attributes:
        relative_error: ||W X - W_hat X||^2 / ||W X||^2, of W_hat as it stands in the model.
        seconds: spent in the solver.
        outlier_ratio: the share of the weights that are kept in 16 bits.
        damping: what was really added to the Hessian's diagonal, as a fraction of its mean; None: nothing.
        damping_raised: because the factorization failed with what was asked for.
        dead_columns: inputs that are zero in all of the calibration data.
        clipped_scales: scales that are as small as their format goes.
        non_finite: activations or the solver's weights were not finite.
        left_alone: the layer keeps its weights; `notes` says why.
    """

    block: int
    layer: str
    out_features: int
    in_features: int
    relative_error: float = 0.0
    seconds: float = 0.0
    bits_per_weight: float = 0.0
    outlier_ratio: float = 0.0
    damping: float | None = None
    damping_raised: bool = False
    dead_columns: int = 0
    clipped_scales: int = 0
    non_finite: bool = False
    left_alone: bool = False
    notes: str = ""


WARNINGS = ("damping_raised", "dead_columns", "clipped_scales", "non_finite", "left_alone")  # fields of a record


@torch.no_grad()
def quantize(
    model: Any,
    sequences: Tensor,
    solver: LayerSolver,
    spec: GridSpec,
    *,
    true_sequential: bool,
    batch_size: int,
    stored_bits: float,
    report: Callable[[LayerRecord], None],
    phases: Phases | None = None,
) -> list[LayerRecord]:
    """Replace the weights of every linear layer of every block by quantized ones.

    Args:
        sequences: calibration token ids (sequences, length).
        true_sequential: see `runners.schema.Calibration`.
        stored_bits: what a weight takes that is left alone.
        report: called with each layer as it is finished.
        phases: told the seconds spent in `calibrate`, `solve` and `propagate`.

    Raises:
        Unsupported: the method cannot do what `spec` asks.
        InputError: a layer cannot be put on the grid, or the activations that leave a block are not finite.
    """
    phases = phases or Phases(next(model.parameters()).device)
    with phases.of("calibrate"):
        walk = Walk(model, sequences, batch_size)
    records = []
    for index in range(len(walk.blocks)):
        for record in _quantize_block(walk, index, solver, spec, true_sequential, stored_bits, phases):
            records.append(record)
            report(record)
        with phases.of("propagate"):
            walk.advance(index)
    return records


def _quantize_block(
    walk: Walk,
    index: int,
    solver: LayerSolver,
    spec: GridSpec,
    true_sequential: bool,
    stored_bits: float,
    phases: Phases,
) -> Iterator[LayerRecord]:
    with phases.of("calibrate"):
        groups = shared_inputs(walk, index)
    layers = linear_layers(walk.blocks[index])
    used = {name for group in groups for name in group}
    for name in (name for name in layers if name not in used):
        yield _left_alone(layers[name], index, name, stored_bits, "never used, so there is nothing to calibrate it on")
    for passed in [[group] for group in groups] if true_sequential else [groups]:
        with phases.of("calibrate"):
            inputs = input_statistics(walk, index, passed)
        for group, statistics in zip(passed, inputs, strict=True):
            if not statistics.finite:
                for name in group:
                    why = "its activations are not finite"
                    yield _left_alone(layers[name], index, name, stored_bits, why, non_finite=True)
                continue
            weights = {name: layers[name].weight.clone() for name in group}  # the modules' own are overwritten
            for names in [group] if takes_rows_alone(solver) else [(name,) for name in group]:
                siblings = tuple(weight for name, weight in weights.items() if name not in names)
                stacked = torch.cat([weights[name].float() for name in names])
                problem = LayerProblem(stacked, statistics.hessian, mean_input=statistics.mean_input, siblings=siblings)
                with phases.of("solve"):
                    here = {name: layers[name] for name in names}
                    solved = _solve(here, problem, solver, spec, index, stored_bits)
                yield from solved


def _solve(
    layers: dict[str, LinearLayer],
    problem: LayerProblem,
    solver: LayerSolver,
    spec: GridSpec,
    block: int,
    stored_bits: float,
) -> list[LayerRecord]:
    """Quantize layers whose weights stand one above the other in `problem`."""
    where = f"{', '.join(layers)} in block {block}"
    device, start = problem.hessian.device, clock(problem.hessian.device)
    try:
        answer = solver.solve(problem, spec)
    except Unsupported as error:
        raise Unsupported(f"{where}: {error}") from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error
    seconds = clock(device) - start
    records, first = [], 0
    for name, layer in layers.items():
        rows = slice(first, first := first + len(layer.weight))
        mine = answer.of_rows(rows) if len(layers) > 1 else answer
        weight = mine.weight
        if not torch.isfinite(weight).all():
            why = f"{type(solver).__name__} gave weights that are not finite"
            records.append(_left_alone(layer, block, name, stored_bits, why, non_finite=True))
            continue
        layer.replace(weight)
        own = replace(problem, weight=problem.weight[rows])
        error = own.relative_error(layer.weight.float())  # in the model's dtype, so with its rounding
        records.append(_record(own, mine, block, name, error, seconds * len(weight) / len(problem.weight)))
    return records


def _record(
    problem: LayerProblem, answer: QuantizedLayer, block: int, name: str, error: float, seconds: float
) -> LayerRecord:
    return LayerRecord(
        block=block,
        layer=name,
        out_features=problem.weight.shape[0],
        in_features=problem.weight.shape[1],
        relative_error=error,
        seconds=seconds,
        bits_per_weight=answer.bits_per_weight,
        outlier_ratio=answer.outlier_ratio,
        damping=answer.damping,
        damping_raised=answer.damping_raised,
        dead_columns=problem.dead_columns,
        clipped_scales=answer.grid.clipped,
        notes="; ".join(answer.notes),
    )


def _left_alone(
    layer: LinearLayer, block: int, name: str, stored_bits: float, why: str, non_finite: bool = False
) -> LayerRecord:
    out_features, in_features = layer.weight.shape
    return LayerRecord(
        block=block,
        layer=name,
        out_features=out_features,
        in_features=in_features,
        bits_per_weight=stored_bits,
        non_finite=non_finite,
        left_alone=True,
        notes=why,
    )


def refuse_warnings(record: LayerRecord) -> None:
    """What `warnings=error` does with a layer for which something did not go as asked.

    Raises:
        InputError: naming the layer and what it was.
    """
    if found := [f"{kind.replace('_', ' ')}: {value}" for kind in WARNINGS if (value := getattr(record, kind))]:
        what = ", ".join(found) + (f" ({record.notes})" if record.notes else "")
        raise InputError(f"{record.layer} in block {record.block}: {what}; warnings=record goes on and records it")


def summary(records: list[LayerRecord], parameters: int, stored_bits: float) -> dict[str, float]:
    """What the records of all layers come to, as it stands in `metrics.json`.

    Args:
        parameters: of the whole model, embeddings and head included, tied ones once.
        stored_bits: of those that are not in a quantized layer.
    """
    sizes = [record.out_features * record.in_features for record in records]
    quantized = sum(sizes)
    bits = sum(size * record.bits_per_weight for size, record in zip(sizes, records, strict=True))
    outliers = sum(size * record.outlier_ratio for size, record in zip(sizes, records, strict=True))
    errors = [record.relative_error for record in records if not record.left_alone]
    figures: dict[str, float] = {
        "bits_per_weight": bits / quantized,
        "bits_per_parameter": (bits + (parameters - quantized) * stored_bits) / parameters,
        "outlier_ratio": outliers / quantized,
        "layers/mean_relative_error": sum(errors) / max(1, len(errors)),
        "layers/count": len(records),
    }
    return figures | {f"warnings/{kind}": sum(int(getattr(record, kind)) for record in records) for kind in WARNINGS}

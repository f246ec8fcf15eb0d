"""Solve the layers of one input group, write their quantized weights into the model, and measure the errors.

Layers that share an input share its Hessian. A method that treats every row of a weight alone is given all of them at once,
their rows stacked: one factorization of the Hessian serves the group. Any other method is given one layer at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported, join_rows
from runners.errors import InputError
from runners.models.blocks import LinearLayer
from runners.models.memory import Memory, Remedy
from runners.quantization.fallback import NOT_FINITE, RoundToNearest, why_not_calibrated
from runners.quantization.input_statistics import InputStatistics
from runners.quantization.layer_errors import relative_error, rounding_error, token_error
from runners.results.layers import LayerRecord
from runners.results.metrics import FALLBACK_ERROR, FALLBACK_KEEP, FALLBACK_RTN, INT
from runners.timing import Phases, clock


class LayerGroup:
    """The layers of one input group, and a copy of their weights.

    The copy is what an attempt after an out-of-memory error starts from: the one before it may have overwritten some of the
    model's weights.

    Args:
        block: index of the decoder block.
        layers: the group's layers by name, in the order in which the block uses them.
        statistics: of the input that they share; None: nothing is known of it.
    """

    def __init__(self, block: int, layers: dict[str, LinearLayer], statistics: InputStatistics | None) -> None:
        self.block, self.layers, self.statistics = block, layers, statistics
        self.weights = {name: layer.weight.clone() for name, layer in layers.items()}  # (out, in) each

    @property
    def rows(self) -> int:
        """Output features of all layers together."""
        return sum(map(len, self.weights.values()))

    def problem(self, names: tuple[str, ...]) -> LayerProblem:
        """The layer problem of some of the layers, their rows stacked in the order of `names`."""
        siblings = tuple(weight.float() for name, weight in self.weights.items() if name not in names)
        # Siblings are the layers left out: AWQ's column scale must suit all layers that share an input.
        weight = torch.cat([self.weights[name].float() for name in names])
        if (statistics := self.statistics) is None:
            # As if all inputs were dead. Zeros that share one place: a matrix of them could be larger than the layer.
            nothing = torch.zeros((), device=weight.device).expand(weight.shape[1], weight.shape[1])
            return LayerProblem(weight, nothing, siblings=siblings)
        return LayerProblem(
            weight,
            statistics.hessian,
            mean_input=statistics.mean_input,
            siblings=siblings,
            cross=statistics.cross,
            cross_half=statistics.cross_half,
        )


@dataclass(frozen=True, eq=False)
class SolvedLayer:
    """The record of a layer, and its quantized weights; None: the layer keeps its own."""

    record: LayerRecord
    quantized: QuantizedLayer | None = None


@dataclass(frozen=True)
class GroupSolver:
    """A method and a grid, applied to one input group after the other.

    Attributes:
        solver: the method.
        spec: the grid.
        stored_bits: bits per weight of a layer that keeps its own weights.
        memory: in how many slices of rows a layer is solved; made more where memory runs out.
        phases: counts the seconds under `solve`.
        free_gpu: a remedy that moves whatever else is on the GPU to host memory.
        fallback: what layers get that calibration has reached too little, one of `metrics.FALLBACKS`.
    """

    solver: LayerSolver
    spec: GridSpec
    stored_bits: float
    memory: Memory
    phases: Phases
    free_gpu: Remedy
    fallback: str = FALLBACK_RTN

    @property
    def _rows_independent(self) -> bool:
        return self.solver.rows_independent and self.spec.rows_independent

    def solve(self, group: LayerGroup) -> Iterator[SolvedLayer]:
        """Quantize the layers of a group in the model, or give them the fallback.

        Raises:
            Unsupported: the method cannot do what the grid asks.
            InputError: a layer cannot be put on the grid, memory ran out for good, or `fallback=error`.
        """
        if (why := why_not_calibrated(group.statistics)) is not None:
            yield from self.fall_back(group, why)
        else:
            yield from self._solve(group)

    def fall_back(self, group: LayerGroup, why: str) -> Iterator[SolvedLayer]:
        """Give the layers of a group what `fallback` says, and mark their records.

        Args:
            group: its statistics are None where no token has reached it.
            why: in words.

        Raises:
            InputError: `fallback=error`; naming the first layer.
        """
        not_finite, tokens = why == NOT_FINITE, 0 if group.statistics is None else group.statistics.tokens
        marks: dict[str, Any] = {"fallback": True, "tokens": tokens, "non_finite": not_finite}
        if self.fallback == FALLBACK_ERROR:
            raise InputError(
                f"{next(iter(group.layers))} in block {group.block} cannot be calibrated: {why}. fallback=rtn rounds such "
                "layers to nearest; more sequences (calibration.num_sequences) may reach them"
            )
        if self.fallback == FALLBACK_KEEP:
            for name, layer in group.layers.items():
                kept = left_alone(group.block, name, layer.weight.shape, self.stored_bits, why)
                yield SolvedLayer(replace(kept.record, **marks))
            return
        # Errors of inputs that are not finite would be none either.
        rounded = LayerGroup(group.block, group.layers, None if not_finite else group.statistics)
        for layer in replace(self, solver=RoundToNearest())._solve(rounded):
            notes = f"rounded to nearest, as {why}" + f"; {layer.record.notes}" * bool(layer.record.notes)
            yield replace(layer, record=replace(layer.record, notes=notes, **marks))

    def _solve(self, group: LayerGroup) -> Iterator[SolvedLayer]:
        rows_independent = self._rows_independent
        remedies = [self.free_gpu]  # first: moving activations changes no sum
        if rows_independent:
            remedies.append(self.memory.thinner_slices(group.rows))
        for names in [tuple(group.layers)] if rows_independent else [(name,) for name in group.layers]:
            where = f"{', '.join(names)} in block {group.block}"
            with self.phases.of("solve"):
                attempt = partial(self._solve_stacked, group, names, where)
                solved = self.memory.retry(f"in the solver of {where}", attempt, *remedies)
            yield from solved

    def _solve_stacked(self, group: LayerGroup, names: tuple[str, ...], where: str) -> list[SolvedLayer]:
        """Solve layers whose rows are stacked, and divide the answer among them. Repeatable: see `LayerGroup`."""
        problem = group.problem(names)
        device = problem.hessian.device
        start = clock(device)  # waits for the GPU, so that only the solver's work is counted
        answer = self._answer(problem, where)
        # The time of a stacked solve is divided by rows: which layer took it cannot be told.
        seconds_per_row = (clock(device) - start) / len(problem.weight)
        solved, first = [], 0
        for name in names:
            rows = slice(first, first := first + len(group.weights[name]))
            # An answer with outliers cannot be divided by rows, so a layer that is alone keeps it as it is.
            quantized = answer.select_rows(rows) if len(names) > 1 else answer
            own = replace(problem, weight=problem.weight[rows])
            solved.append(self._write(group, name, own, quantized, seconds_per_row * len(own.weight)))
        return solved

    def _answer(self, problem: LayerProblem, where: str) -> QuantizedLayer:
        """The method's answer, from slices of the rows where memory was short: exact, as the rows are independent."""
        slices = self.memory.row_slices if self._rows_independent else 1
        try:
            # A last slice may be smaller. Each part has the same Hessian, and repeats its factorization.
            parts = [replace(problem, weight=rows) for rows in problem.weight.chunk(slices)]
            return join_rows([self.solver.solve(part, self.spec) for part in parts])
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from error
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error

    def _write(
        self, group: LayerGroup, name: str, problem: LayerProblem, quantized: QuantizedLayer, seconds: float
    ) -> SolvedLayer:
        """Write a layer's quantized weights into the model, and measure what they cost as the model has them."""
        weight = quantized.weight
        if not torch.isfinite(weight).all():  # written, they would spoil every later block: the layer keeps its own
            return self._left_alone(group, name, f"{type(self.solver).__name__} gave weights that are not finite")
        layer, notes = group.layers[name], list(quantized.notes)
        layer.replace(weight)
        if coarse := quantized.grid.coarse_scales:
            notes.append(f"{coarse} scales are below 2^-14 and lose bits in float16: scale_bits=32 keeps them")
        # Errors are of `layer.weight`, not of `weight`: a float16 model rounds what is written to it.
        errors = self._errors(problem.weight, layer.weight, group.statistics)
        worse = errors.pop("rounding")
        held_out = errors["held_out_error"]
        if is_worse := held_out is not None and worse is not None and held_out > worse:
            notes.append(f"held-out error {held_out:.3g}, that of rounding to nearest is {worse:.3g}")
        record = LayerRecord(
            block=group.block,
            layer=name,
            out_features=problem.weight.shape[0],
            in_features=problem.weight.shape[1],
            seconds=seconds,
            bits_per_weight=quantized.bits_per_weight,
            outlier_ratio=quantized.outlier_ratio,
            damping=quantized.damping,
            damping_raised=quantized.damping_raised,
            dead_columns=0 if group.statistics is None else problem.dead_columns,
            clipped_scales=quantized.grid.clipped_scales,
            worse_than_rounding=is_worse,
            notes="; ".join(notes),
            tokens=None if group.statistics is None else group.statistics.tokens,
            history=quantized.history,
            **_grid_columns(quantized.grid.spec),
            **errors,
            **_energy_columns(group.statistics),
        )
        return SolvedLayer(record, quantized)

    def _errors(self, original: Tensor, written: Tensor, statistics: InputStatistics | None) -> dict[str, Any]:
        """The errors of a layer by the names of its record, and that of `rounding` to nearest on held-out tokens."""
        slices = self.memory.row_slices  # here, too: D H is as large as W
        errors: dict[str, Any] = dict.fromkeys(("relative_error", "held_out_error", "token_error", "rounding"))
        if statistics is None:
            return errors
        errors["relative_error"] = relative_error(original, written, statistics.hessian, slices)
        if (held_out := statistics.held_out) is not None:
            errors["held_out_error"] = relative_error(original, written, held_out, slices)
            errors["rounding"] = rounding_error(original, written.dtype, self.spec, held_out, slices)
        if (tokens := statistics.held_out_tokens) is not None:
            errors["token_error"] = token_error(original, written, tokens, slices)
        return errors

    def _left_alone(self, group: LayerGroup, name: str, why: str) -> SolvedLayer:
        return left_alone(group.block, name, group.layers[name].weight.shape, self.stored_bits, why, non_finite=True)


def _grid_columns(spec: GridSpec) -> dict[str, Any]:
    """The grid that a layer is on, by the names of its record."""
    kind = INT if spec.format is None else spec.format.name
    return {"bits": spec.bits, "group_size": spec.group_size, "grid": kind, "symmetric": spec.symmetric}


def _energy_columns(statistics: InputStatistics | None) -> dict[str, Any]:
    """The token energy of a layer's input, by the names of its record."""
    return {} if statistics is None else {f"energy_{name}": value for name, value in asdict(statistics.energy).items()}


def left_alone(
    block: int, name: str, shape: tuple[int, ...], stored_bits: float, why: str, non_finite: bool = False
) -> SolvedLayer:
    """A matrix that keeps its own weights, and the reason, which its record tells.

    Args:
        block: index of the decoder block.
        name: of the layer or parameter inside the block.
        shape: of the matrix; all dimensions but the last count as output features, as those of fused experts do.
        stored_bits: per weight.
        why: in words.
        non_finite: whether numbers that are not finite are the reason.
    """
    *rows, columns = shape
    record = LayerRecord(
        block=block,
        layer=name,
        out_features=math.prod(rows),
        in_features=columns,
        bits_per_weight=stored_bits,
        non_finite=non_finite,
        left_alone=True,
        notes=why,
    )
    return SolvedLayer(record)

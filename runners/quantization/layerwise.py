"""Quantize a model: block by block, on what the already quantized blocks feed the next one.

Or, with full-precision inputs, on what the unquantized blocks feed it: then what calibration says of a block depends
neither on the method nor on the bits, and is computed once for all runs that share it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported, join_rows, objective
from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.blocks import BlockSource, LinearLayer, linear_layers, replace_weights
from runners.models.memory import Memory
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import (
    InputStatistics,
    MeasuredGroups,
    StatisticsCache,
    input_groups,
    input_statistics,
)
from runners.results.layers import LayerRecord
from runners.timing import Phases, clock


@dataclass(frozen=True)
class Plan:
    """What is to be done with every linear layer.

    Attributes:
        true_sequential: see `runners.data.calibration.Calibration`.
        full_precision: every block is calibrated on what the unquantized blocks before it feed it.
        stored_bits: what a weight takes that is left alone.
    """

    solver: LayerSolver
    spec: GridSpec
    true_sequential: bool = False
    full_precision: bool = False
    stored_bits: float = 16.0


class Quantization:
    """One pass over the blocks of a model.

    Args:
        sequences: calibration token ids (sequences, length).
        batch_size: sequences that are held together.
        held_out: token ids (sequences, length) on which the layers' errors are measured, too.
        blocks: where finished blocks are kept, and gone on from; None: nowhere.
        shared: the statistics that runs with full-precision inputs share; None: each computes its own.
        memory: what is to be held at once.
        phases: told the seconds spent in `calibrate`, `solve` and `propagate`.
    """

    def __init__(
        self,
        source: BlockSource,
        sequences: Tensor,
        plan: Plan,
        *,
        batch_size: int,
        held_out: Tensor | None = None,
        blocks: FinishedBlocks | None = None,
        shared: StatisticsCache | None = None,
        memory: Memory | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.source, self.plan, self.blocks, self.shared = source, plan, blocks, shared
        self.memory = memory or Memory()
        self.phases = phases or Phases(source.device)
        self._inputs = sequences, batch_size, held_out
        self._walk: BlockActivations | None = None
        self._position = 0  # of the walk: the block whose inputs it holds
        self._answers: dict[str, QuantizedLayer] = {}  # of the current block

    @torch.no_grad()
    def run(self, report: Callable[[LayerRecord], None]) -> list[LayerRecord]:
        """Quantize every linear layer of every block that is not finished already.

        Args:
            report: called with each layer as it is finished, those of blocks finished earlier included.

        Raises:
            Unsupported: the method cannot do what the grid asks.
            InputError: a layer cannot be put on the grid, the activations that leave a block are not finite, memory ran
                out for good, or the finished blocks belong to another run.
        """
        records = self._resume()
        for record in records:
            report(record)
        for index in range(len(self.blocks.manifests) if self.blocks else 0, len(self.source.blocks)):
            before, mine = dict(self.phases.seconds), []
            for record in self._block(index):
                mine.append(record)
                report(record)
            records += mine
            if self.blocks is not None:
                seconds = {name: value - before.get(name, 0.0) for name, value in self.phases.seconds.items()}
                manifest = {"records": mine, "memory": self.memory.state, "seconds": seconds}
                self.blocks.save(index, self._answers, manifest)
        return records

    def _resume(self) -> list[LayerRecord]:
        if self.blocks is None or not self.blocks.resume():
            return []
        self.memory.restore(self.blocks.manifests[-1].memory)
        for manifest in self.blocks.manifests:
            for name, seconds in manifest.seconds.items():
                self.phases.seconds[name] = self.phases.seconds.get(name, 0.0) + seconds
        return [record for manifest in self.blocks.manifests for record in manifest.records]

    def _block(self, index: int) -> Iterator[LayerRecord]:
        self._answers = {}
        known = self.shared.get(index) if self.shared and self.plan.full_precision else None
        walk = self._walk_to(index) if known is None else None  # before this block is opened: it may open others
        with self.source.open_block(index) as block:
            layers, used = linear_layers(block), set()
            for measured in [known] if walk is None else self._measure(walk, index):
                for group, statistics in measured or []:
                    used.update(group)
                    yield from self._solve_group(group, layers, statistics, index)
            for name in (name for name in layers if name not in used):
                why = "never used, so there is nothing to calibrate it on"
                yield _left_alone(layers[name], index, name, self.plan.stored_bits, why)
            if walk is not None and not self.plan.full_precision:
                self._advance(walk)

    def _measure(self, walk: BlockActivations, index: int) -> Iterator[MeasuredGroups]:
        """What the layers of a block are calibrated on: all at once or, where it is true-sequential, group by group."""
        when = f"in the calibration of block {index}"
        smaller = self.memory.smaller_batches(walk.batch_size)

        def retry(run: Callable[[], Any]) -> Any:
            with self.phases.of("calibrate"):
                return self.memory.retry(when, run, smaller, walk.to_host, self.memory.smaller_hessian_parts)

        groups = retry(lambda: input_groups(walk, index))
        for passed in [[group] for group in groups] if self.plan.true_sequential else [groups]:
            statistics = retry(lambda passed=passed: input_statistics(walk, index, passed))
            measured = list(zip(passed, statistics, strict=True))
            if self.plan.full_precision:  # while the block has its own weights
                if self.shared:
                    self.shared.put(index, measured)
                self._advance(walk)
            yield measured

    def _walk_to(self, index: int) -> BlockActivations:
        """The activations that enter block `index`, which are made anew where there are none."""
        if self._walk is None:
            sequences, batch_size, held_out = self._inputs
            with self.phases.of("calibrate"):
                self._walk = BlockActivations(self.source, sequences, batch_size, held_out, self.memory)
        if self._position < index:
            state = self.memory.batch_size
            while self._position < index:
                with self.source.open_block(self._position) as block:
                    if self.blocks is not None and not self.plan.full_precision:
                        self.memory.batch_size = self.blocks.manifests[self._position].memory["batch_size"]
                        replace_weights(block, self.blocks.layers(self._position, str(self.source.device)))
                    self._advance(self._walk)
            self.memory.batch_size = state
        return self._walk

    def _advance(self, walk: BlockActivations) -> None:
        index = self._position
        with self.phases.of("propagate"):
            smaller = self.memory.smaller_batches(walk.batch_size)
            self.memory.retry(f"after block {index}", lambda: walk.advance(index), smaller, walk.to_host)
        self._position += 1

    def _solve_group(
        self, group: tuple[str, ...], layers: dict[str, LinearLayer], statistics: InputStatistics, index: int
    ) -> Iterator[LayerRecord]:
        if not statistics.finite:
            for name in group:
                why = "its activations are not finite"
                yield _left_alone(layers[name], index, name, self.plan.stored_bits, why, non_finite=True)
            return
        weights = {name: layers[name].weight.clone() for name in group}  # the modules' own are overwritten
        alone = self.plan.solver.rows_independent
        remedies = [self._walk.to_host] if self._walk else []
        if alone:
            remedies.append(self.memory.thinner_slices(sum(map(len, weights.values()))))
        for names in [group] if alone else [(name,) for name in group]:
            where = f"{', '.join(names)} in block {index}"
            solve = partial(self._solve, names, layers, weights, statistics, index, where)
            with self.phases.of("solve"):
                solved = self.memory.retry(f"in the solver of {where}", solve, *remedies)
            yield from solved

    def _solve(
        self,
        names: tuple[str, ...],
        layers: dict[str, LinearLayer],
        weights: dict[str, Tensor],
        statistics: InputStatistics,
        block: int,
        where: str,
    ) -> list[LayerRecord]:
        """Quantize layers whose weights stand one above the other; may be called again if it fails."""
        siblings = tuple(weight for name, weight in weights.items() if name not in names)
        weight = torch.cat([weights[name].float() for name in names])
        problem = LayerProblem(weight, statistics.hessian, mean_input=statistics.mean_input, siblings=siblings)
        device, start = problem.hessian.device, clock(problem.hessian.device)
        answer = self._answer(where, problem)
        seconds = clock(device) - start
        records, first = [], 0
        for name in names:
            layer = layers[name]
            rows = slice(first, first := first + len(layer.weight))
            mine = answer.select_rows(rows) if len(names) > 1 else answer
            weight = mine.weight
            if not torch.isfinite(weight).all():
                why = f"{type(self.plan.solver).__name__} gave weights that are not finite"
                records.append(_left_alone(layer, block, name, self.plan.stored_bits, why, non_finite=True))
                continue
            layer.replace(weight)
            self._answers[name] = mine
            own = replace(problem, weight=problem.weight[rows])
            record = _record(own, mine, block, name, seconds * len(weight) / len(problem.weight))
            errors = {"relative_error": self._error(own.weight, layer.weight, statistics.hessian)}
            if statistics.held_out is not None:
                errors["held_out_error"] = self._error(own.weight, layer.weight, statistics.held_out)
            records.append(replace(record, **errors))
        return records

    def _answer(self, where: str, problem: LayerProblem) -> QuantizedLayer:
        solver, spec = self.plan.solver, self.plan.spec
        slices = self.memory.row_slices if solver.rows_independent else 1
        try:
            parts = [replace(problem, weight=rows) for rows in problem.weight.chunk(slices)]
            return join_rows([solver.solve(part, spec) for part in parts])
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from error
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error

    def _error(self, weight: Tensor, stands: Tensor, hessian: Tensor) -> float:
        """The relative error of a weight as it `stands` in the model, so with the rounding of its dtype."""
        error = energy = 0.0
        for original, rows in zip(
            weight.chunk(self.memory.row_slices), stands.chunk(self.memory.row_slices), strict=True
        ):
            error += objective(rows.float() - original, hessian)
            energy += objective(original, hessian)
        return error / energy if energy > 0 else 0.0


def _record(problem: LayerProblem, answer: QuantizedLayer, block: int, name: str, seconds: float) -> LayerRecord:
    return LayerRecord(
        block=block,
        layer=name,
        out_features=problem.weight.shape[0],
        in_features=problem.weight.shape[1],
        seconds=seconds,
        bits_per_weight=answer.bits_per_weight,
        outlier_ratio=answer.outlier_ratio,
        damping=answer.damping,
        damping_raised=answer.damping_raised,
        dead_columns=problem.dead_columns,
        clipped_scales=answer.grid.clipped_scales,
        notes="; ".join(answer.notes),
        history=answer.history,
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

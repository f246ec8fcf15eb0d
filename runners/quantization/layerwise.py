"""Layer-wise quantization of a model: one decoder block after the other, each layer given the statistics of its inputs.

    for each decoder block:
        for each input group of the block, as the calibration mode measures it:
            min  tr((W - W_hat) H (W - W_hat)^T)    over W_hat on the grid, H = mean of x x^T over the calibration tokens
        write the block to disk, where a killed run finds it

This is the scheme of GPTQ (Frantar et al., 2023, section 4) and of QuantEase (Behdin et al., 2023, section 2).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn

from quantease.grid import GridSpec
from quantease.layer import LayerSolver, QuantizedLayer
from runners.models.blocks import LinearLayer, SpecOf, full_name, linear_layers, other_matrices
from runners.models.experts import routers
from runners.quantization.calibration_modes import CalibrationMode
from runners.quantization.fallback import UNREACHED
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.group_solver import GroupSolver, LayerGroup, SolvedLayer, left_alone
from runners.quantization.input_statistics import InputStatistics
from runners.results.layers import ROUTER_NOTE, SKIPPED_NOTE, LayerRecord
from runners.results.metrics import FALLBACK_RTN
from runners.timing import peak_so_far_gb


class Quantization:
    """One pass over the decoder blocks of a model.

    Args:
        inputs: the calibration mode. Its source is the model that is quantized, in place where it is in memory.
        solver: the method.
        spec: the grid.
        stored_bits: bits per weight of a layer that keeps its own weights.
        finished: where finished blocks are kept and found again after an interruption; None: nowhere.
        fallback: what layers get that calibration has reached too little.
        spec_of: the grid of each layer, where they are not all on `spec`; None for a layer: it keeps its weights.
    """

    def __init__(
        self,
        inputs: CalibrationMode,
        solver: LayerSolver,
        spec: GridSpec,
        *,
        stored_bits: float = 16.0,
        finished: FinishedBlocks | None = None,
        fallback: str = FALLBACK_RTN,
        spec_of: SpecOf | None = None,
    ) -> None:
        self.inputs, self.finished = inputs, finished
        activations = inputs.activations
        self._source, self._memory, self._phases = activations.source, activations.memory, activations.phases
        self._spec_of = spec_of or (lambda _: spec)
        self._groups = GroupSolver(solver, spec, stored_bits, self._memory, self._phases, activations.to_host, fallback)

    @torch.no_grad()
    def run(
        self, report: Callable[[LayerRecord], None], on_block: Callable[[int], None] = lambda _: None
    ) -> list[LayerRecord]:
        """Quantize every linear layer of every decoder block that is not finished already, and record all other matrices.

        Args:
            report: called with each layer's record once it is known, those of blocks finished earlier included.
            on_block: called with the index of each decoder block that is finished now.

        Returns:
            The records of all layers, and of the matrices outside them, in the same order.

        Raises:
            Unsupported: the method cannot do what the grid asks.
            InputError: a layer cannot be put on the grid, the activations that leave a block are not finite, memory ran
                out for good, or the finished blocks belong to another run.
        """
        records = self._resume()
        for record in records:
            report(record)
        for index in range(len(self.finished.manifests) if self.finished else 0, len(self._source.blocks)):
            seconds_before = dict(self._phases.seconds)  # phases count the whole run, a manifest its own block
            of_block: list[LayerRecord] = []
            quantized: dict[str, QuantizedLayer] = {}
            for solved in self._block(index):
                of_block.append(solved.record)
                report(solved.record)
                if solved.quantized is not None:
                    quantized[solved.record.layer] = solved.quantized
            records += of_block
            self._save(index, quantized, of_block, seconds_before)
            on_block(index)
        return records

    def _resume(self) -> list[LayerRecord]:
        """Take over records, seconds and the state of memory from the finished blocks, as if this process had made them."""
        if self.finished is None or not self.finished.resume():
            return []
        # What the last block was left with: how batches and Hessians are divided changes the order of sums.
        self._memory.restore(self.finished.manifests[-1].memory)
        for manifest in self.finished.manifests:
            for name, seconds in manifest.seconds.items():
                self._phases.seconds[name] = self._phases.seconds.get(name, 0.0) + seconds
        return [record for manifest in self.finished.manifests for record in manifest.records]

    def _block(self, index: int) -> Iterator[SolvedLayer]:
        """Quantize the layers of one decoder block in the model."""
        self.inputs.enter(index, self.finished)  # before the block is opened, as this may open the ones before it
        with self._source.open_block(index) as block:
            layers, used = linear_layers(block), set[str]()
            for measured in self.inputs.measure():
                for names, statistics in measured:
                    used.update(names)
                    yield from self._solve(index, {name: layers[name] for name in names}, statistics)
            unused = {name: layer for name, layer in layers.items() if name not in used}
            for name, layer in unused.items():
                yield from self._solve(index, {name: layer}, None, UNREACHED)
            yield from self._other_matrices(index, block)
            self.inputs.leave()  # last, while the block is open: its quantized weights leave the memory with it

    def _solve(
        self,
        index: int,
        layers: dict[str, LinearLayer],
        statistics: InputStatistics | None,
        unreached: str | None = None,
    ) -> Iterator[SolvedLayer]:
        """Solve the layers of an input group: those on one grid together, each grid's apart.

        Args:
            unreached: why the layers take the fallback; None: the statistics say whether they do.
        """
        by_spec: dict[GridSpec | None, dict[str, LinearLayer]] = {}
        for name, layer in layers.items():
            by_spec.setdefault(self._spec_of(full_name(index, name)), {})[name] = layer
        for spec, alike in by_spec.items():
            if spec is None:
                for name, layer in alike.items():
                    yield left_alone(index, name, layer.weight.shape, self._groups.stored_bits, SKIPPED_NOTE)
                continue
            groups = replace(self._groups, spec=spec)
            # Without a name of its own, so that the copies of its weights are freed before more is measured.
            if unreached is None:
                yield from groups.solve(LayerGroup(index, alike, statistics))
            else:
                yield from groups.fall_back(LayerGroup(index, alike, None), unreached)

    def _other_matrices(self, index: int, block: nn.Module) -> Iterator[SolvedLayer]:
        """Records of the matrices that no method is given. They count in the bits: most of a model may be in them."""
        usual, routing = {layer.weight.dtype for layer in linear_layers(block).values()}, routers(block)
        for name, matrix in other_matrices(block).items():
            # Some modules keep float32 whatever the model's dtype: routers, convolutions of state space models.
            kept = bool(usual) and matrix.dtype not in usual
            bits = 8.0 * matrix.element_size() if kept else self._groups.stored_bits
            why = f"not a linear layer, but a parameter of shape {tuple(matrix.shape)}: no method quantizes it"
            why = ROUTER_NOTE if name in routing else why
            yield left_alone(index, name, matrix.shape, bits, why)

    def _save(
        self,
        index: int,
        quantized: dict[str, QuantizedLayer],
        records: list[LayerRecord],
        seconds_before: dict[str, float],
    ) -> None:
        if self.finished is None:
            return
        seconds = {name: value - seconds_before.get(name, 0.0) for name, value in self._phases.seconds.items()}
        peak = peak_so_far_gb(self._source.device)
        self.finished.save(
            index,
            quantized,
            {"records": records, "memory": self._memory.state, "seconds": seconds, "peak_memory_gb": peak},
        )

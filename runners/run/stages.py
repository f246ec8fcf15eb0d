"""The stages of a run after its preflight: quantize, evaluate, zero-shot. Each returns its part of `metrics.json`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from runners.config.settings import Settings
from runners.console import progress
from runners.data.bos import NONE, WINDOW, probes
from runners.data.calibration import Sequences
from runners.data.windows import Windows
from runners.evaluation.blockwise import BlockwiseEvaluation, ReferenceCache
from runners.evaluation.likelihood import perplexity
from runners.evaluation.zero_shot import measure_tasks, skip_tasks, whole_model
from runners.models.blocks import BlockSource, linear_layers, other_matrices
from runners.models.memory import Memory
from runners.models.streaming import open_model
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.calibration_modes import (
    CalibrationMode,
    FullPrecisionInputs,
    NoActivations,
    NoInputs,
    QuantizedInputs,
)
from runners.quantization.finished_blocks import FinishedBlocks, delete_finished_blocks
from runners.quantization.input_statistics import StatisticsCache
from runners.quantization.layerwise import Quantization
from runners.quantization.paired_inputs import PairedInputs
from runners.quantization.stored_elsewhere import gguf_metrics, stored_metrics, stored_records
from runners.results import metrics
from runners.results.layers import LayerRecord, mean_bits, summarize_layers
from runners.run.keys import model_key, resume_identity, statistics_key
from runners.run.preflight import RunInputs, open_cache
from runners.storage.cache import Cache
from runners.timing import Meter, Phases

Metrics = dict[str, Any]
Measures = dict[str, dict[str, list[float]]]  # by text and measure, one value per window


@dataclass(frozen=True)
class Stages:
    """The stages of one run, and what they share.

    Attributes:
        source: the decoder blocks of the model, one at a time.
        blocks: the finished blocks on disk; None: the run does not quantize.
        cache: tensors that other runs have computed.
        memory: the batch size, and what was done when memory ran out; one for all stages, so that a later one starts with
            what an earlier one has learned.
    """

    settings: Settings
    inputs: RunInputs
    source: BlockSource
    blocks: FinishedBlocks | None
    cache: Cache
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def open(cls, settings: Settings, inputs: RunInputs, folder: Path) -> "Stages":
        """Open the model; with `force`, delete the blocks that an earlier run has finished."""
        source = open_model(inputs.checkpoint, settings.run.model, inputs.device)
        if settings.execution.force:
            delete_finished_blocks(folder)
        blocks = FinishedBlocks(folder, resume_identity(settings, inputs)) if settings.run.quantizes else None
        return cls(settings, inputs, source, blocks, open_cache(settings))

    def quantize(self, on_layer: Callable[[LayerRecord], None]) -> Metrics:
        """Quantize the blocks that are not finished; a run that does not quantize has no error and takes no time.

        Args:
            on_layer: called with the record of every layer, also of those in finished blocks.
        """
        sequences, stored_bits = self.inputs.sequences, self.inputs.checkpoint.stored_bits
        if self.settings.run.is_stored:
            return self._stored(on_layer)
        if self.blocks is None:
            return _unquantized(stored_bits)
        phases = Phases(self.inputs.device)
        quantization = Quantization(
            self._calibration_mode(phases),
            self.settings.run.solver,
            self.settings.run.grid,
            stored_bits=stored_bits,
            finished=self.blocks,
            fallback=self.settings.run.fallback,
            spec_of=self.settings.run.spec_of,
        )
        with Meter(self.inputs.device) as meter:
            records = self._quantize_blocks(quantization, on_layer)
        mixed = {"bits": mean_bits(records)} if self.settings.run.is_mixed else {}
        return (
            summarize_layers(records, self.inputs.checkpoint.parameters, stored_bits)
            | mixed
            | {
                # Not the meter's seconds: the phases add up over all processes of a run that was interrupted and resumed.
                metrics.QUANTIZE_SECONDS: sum(phases.seconds.values()),
                metrics.QUANTIZE_MEMORY: max(meter.peak_memory_gb, self.blocks.peak_memory_gb),
                **{metrics.phase_seconds(phase): seconds for phase, seconds in phases.seconds.items()},
                **(_calibration_metrics(sequences) if sequences else {}),
                metrics.CHECKPOINT_SHA256: self.blocks.sha256,
            }
        )

    def _stored(self, on_layer: Callable[[LayerRecord], None]) -> Metrics:
        """What a checkpoint that was quantized elsewhere says of itself."""
        if self.settings.run.model.gguf is not None:
            return gguf_metrics(self.settings.run.model)
        records = list(stored_records(self.inputs.checkpoint, self.source.blocks))
        for record in records:
            on_layer(record)
        return stored_metrics(self.inputs.checkpoint, records)

    def _quantize_blocks(
        self, quantization: Quantization, on_layer: Callable[[LayerRecord], None]
    ) -> list[LayerRecord]:
        blocks = self.source.blocks
        layers = sum(len(linear_layers(block)) + len(other_matrices(block)) for block in blocks)
        with progress(self._title("quantize"), layers) as bar:
            bar.begin("the evaluation" if self.inputs.windows or self.inputs.tasks else "")

            def count(record: LayerRecord) -> None:
                on_layer(record)
                bar(f"block {record.block + 1}/{len(blocks)}  {record.layer}")

            def finish(index: int) -> None:
                bar.finish(f"block {index + 1} of {len(blocks)}", index + 1, len(blocks))

            return quantization.run(count, finish)

    def _calibration_mode(self, phases: Phases) -> CalibrationMode:
        """The inputs that `calibration.inputs` asks for; none with `calibration=none`."""
        batch_size, calibration, sequences = (
            self.inputs.batch_size,
            self.settings.run.calibration,
            self.inputs.sequences,
        )
        if calibration is None or sequences is None:
            return NoInputs(NoActivations(self.source, self.memory, phases))
        paired = self.settings.run.needs_cross
        options: dict[str, Any] = {"memory": self.memory, "phases": phases}
        original = CalibrationActivations(self.source, sequences.used, batch_size, **options) if paired else None
        activations = CalibrationActivations(
            self.source,
            sequences.used,
            batch_size,
            sequences.held_out,
            length_one=calibration.scales_tokens,
            in_step=original,
            **options,
        )
        if original is not None:
            return PairedInputs(activations, original, calibration.true_sequential)
        if calibration.inputs == "full_precision":
            key = statistics_key(self.settings, self.inputs)
            return FullPrecisionInputs(activations, StatisticsCache(self.cache, key, self.inputs.device))
        return QuantizedInputs(activations, calibration.true_sequential)

    def evaluate(self) -> tuple[Metrics, Measures]:
        """Perplexity on every text, and the agreement with the unquantized model.

        Returns:
            The metrics, and the measures of every window.
        """
        texts = {name: (windows.ids, windows.sha256) for name, windows in self.inputs.windows.items()}
        if not texts:
            return {}, {}
        references, original = self._compared_with()
        options: dict[str, Any] = {"blocks": self.blocks, "references": references, "memory": self.memory}
        options["original"] = original
        probed = {} if self.blocks is not None else self._bos_probes()
        with Meter(self.inputs.device) as meter:
            evaluation = BlockwiseEvaluation(self.source, texts, self.inputs.batch_size, probes=probed, **options)
            with progress(self._title("evaluate"), evaluation.steps) as bar:
                measured = evaluation.run(bar)
        result: Metrics = {metrics.EVALUATE_SECONDS: meter.seconds, metrics.EVALUATE_MEMORY: meter.peak_memory_gb}
        for name, windows in self.inputs.windows.items():
            result |= _text_metrics(name, windows, measured[name])
            tokens = evaluation.token_summary(name)
            result |= {metrics.agreement(name, measure): value for measure, value in tokens.items()}
        keys = {NONE: metrics.PPL_WITHOUT_BOS, WINDOW: metrics.PPL_WITH_BOS}
        result |= {keys[name]: math.exp(fmean(measured.pop(name)["nll"])) for name in probed}
        return result, measured

    def _compared_with(self) -> tuple[ReferenceCache | None, BlockSource | None]:
        """The unquantized model's activations; and that model itself, where it is not the one that is walked."""
        run, original = self.settings.run, self.inputs.original
        if not run.evaluation.agreement or (run.is_stored and original is None):
            return None, None
        if original is None:
            return ReferenceCache(self.cache, model_key(self.settings, self.inputs)), None
        settings = self.settings.reference()
        key = model_key(settings, replace(self.inputs, checkpoint=original))
        return ReferenceCache(self.cache, key), open_model(original, settings.run.model, self.inputs.device)

    def _title(self, stage: str) -> str:
        """Of a stage's progress. It names the cell: with several workers the lines of several cells are mixed."""
        run = self.settings.run
        return f"{stage} {run.method.name}" + (f", {metrics.bits_words(run.bits)}" if run.quantizes else "")

    def _bos_probes(self) -> dict[str, Tensor]:
        """A window of the first text with and without BOS: enough to see whether the model needs it."""
        first = next(iter(self.inputs.windows.values()))
        return probes(first.ids, first.bos, self.inputs.tokenizer)

    def zero_shot(self) -> Metrics:
        """Accuracies, with the whole model in memory; and the reasons of the texts and tasks that were skipped."""
        skipped = {metrics.skipped(name): why for name, why in self.inputs.skipped.items()}
        if not self.inputs.tasks:
            return skipped
        checkpoint, tasks = self.inputs.checkpoint, self.inputs.tasks
        meter = Meter(self.inputs.device)
        try:
            with meter:
                model = whole_model(checkpoint, self.settings.run.model, self.inputs.device, self.blocks)
                options: dict[str, Any] = {"length": checkpoint.sequence_length, "batch_size": self.inputs.batch_size}
                limit = self.settings.run.evaluation.limit
                result = measure_tasks(model, self.inputs.tokenizer, tasks, limit=limit, **options)
        except Exception as error:  # whatever it is, the perplexities are measured and must be stored
            result = skip_tasks(tasks, error)
        facts = {metrics.ZERO_SHOT_SECONDS: meter.seconds, metrics.ZERO_SHOT_MEMORY: meter.peak_memory_gb}
        return result | skipped | facts | {metrics.ZERO_SHOT_BATCH_SIZE: self.inputs.batch_size}

    def resources(self) -> Metrics:
        """Hits and misses of the cache, and what was done when memory ran out."""
        steps = {metrics.MEMORY_STEPS: "; ".join(self.memory.steps)} if self.memory.steps else {}
        return {metrics.CACHE_HITS: self.cache.hits, metrics.CACHE_MISSES: self.cache.misses} | steps


def _calibration_metrics(sequences: Sequences) -> Metrics:
    """What the run was calibrated on, and how much of it was different text."""
    facts: Metrics = {
        metrics.CALIBRATION_SHA256: sequences.sha256,
        metrics.CALIBRATION_BOS: sequences.bos,
        metrics.CALIBRATION_TOKENS: sequences.used.numel(),
        metrics.CALIBRATION_DISTINCT: sequences.distinct_tokens,
        metrics.CALIBRATION_HELD_OUT: 0 if sequences.held_out is None else len(sequences.held_out),
    }
    facts |= {} if sequences.documents is None else {metrics.CALIBRATION_DOCUMENTS: sequences.documents}
    return facts | ({metrics.CALIBRATION_NOTES: "; ".join(sequences.notes)} if sequences.notes else {})


def _unquantized(stored_bits: float) -> Metrics:
    zeros = (metrics.RELATIVE_ERROR, metrics.QUANTIZE_SECONDS, metrics.QUANTIZE_MEMORY, metrics.OUTLIER_RATIO)
    bits = (metrics.BITS_PER_WEIGHT, metrics.BITS_PER_PARAMETER)
    return {key: 0.0 for key in zeros} | {key: stored_bits for key in bits}


def _text_metrics(name: str, windows: Windows, measures: Mapping[str, list[float]]) -> Metrics:
    """The metrics of one text from the measures of its windows: `nll`, and those of agreement where it was measured."""
    agreement = {kind: values for kind, values in measures.items() if kind != "nll"}
    return {
        # In float64: the mean of many float32 losses, and then its exponential, would lose digits.
        metrics.ppl(name): perplexity(torch.tensor(measures["nll"], dtype=torch.float64)),
        metrics.protocol(name): windows.protocol,
        metrics.bos(name): windows.bos,
        metrics.windows(name): len(windows.ids),
        metrics.sha256(name): windows.sha256,
        **{metrics.agreement(name, kind): fmean(values) for kind, values in agreement.items()},
    }

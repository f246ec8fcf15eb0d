"""The stages of a run after its preflight: quantize, evaluate, zero-shot. Each gives what `metrics.json` says of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from runners.config.settings import Settings
from runners.console import progress
from runners.data.calibration import Sequences
from runners.evaluation.blockwise import BlockwiseEvaluation, ReferenceCache
from runners.evaluation.likelihood import perplexity
from runners.evaluation.zero_shot import measure_tasks, whole_model
from runners.models.blocks import BlockSource, linear_layers
from runners.models.memory import Memory, out_of_memory
from runners.models.streaming import open_model
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.calibration_modes import CalibrationMode, FullPrecisionInputs, QuantizedInputs
from runners.quantization.finished_blocks import FinishedBlocks, delete_finished_blocks
from runners.quantization.input_statistics import StatisticsCache
from runners.quantization.layerwise import Quantization
from runners.results.layers import LayerRecord, summarize_layers
from runners.run.keys import model_key, resume_identity, statistics_key
from runners.run.preflight import Inputs
from runners.storage.cache import Cache
from runners.timing import Meter, Phases

Metrics = dict[str, Any]
Windows = dict[str, dict[str, list[float]]]  # text to measure to a value a window


@dataclass(frozen=True)
class Work:
    """What the stages of one run share.

    Attributes:
        blocks: the finished blocks; None: the run does not quantize.
    """

    settings: Settings
    inputs: Inputs
    source: BlockSource
    blocks: FinishedBlocks | None
    cache: Cache
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def begin(cls, settings: Settings, inputs: Inputs, folder: Path) -> "Work":
        """Open the model; with `force`, forget the blocks that an earlier run has finished."""
        source = open_model(inputs.checkpoint, settings.run.model, inputs.device)
        if settings.execution.force:
            delete_finished_blocks(folder)
        blocks = FinishedBlocks(folder, resume_identity(settings, inputs)) if settings.run.quantizes else None
        execution = settings.execution
        cache = Cache(None if execution.cache is None else Path(execution.cache), execution.cache_gb)
        return cls(settings, inputs, source, blocks, cache)

    def quantize(self, report: Callable[[LayerRecord], None]) -> Metrics:
        """Quantize what is not finished; `report` is told of every layer."""
        sequences, stored_bits = self.inputs.sequences, self.inputs.checkpoint.stored_bits
        if sequences is None or self.blocks is None:
            nothing = ("layers/mean_relative_error", "quantize/seconds", "quantize/peak_memory_gb", "outlier_ratio")
            return dict.fromkeys(nothing, 0.0) | {"bits_per_weight": stored_bits, "bits_per_parameter": stored_bits}
        phases = Phases(self.inputs.device)
        quantization = Quantization(
            self._calibration_mode(sequences, phases),
            self.settings.run.solver,
            self.settings.run.grid,
            stored_bits=stored_bits,
            finished=self.blocks,
        )
        blocks = self.source.blocks
        with (
            Meter(self.inputs.device) as meter,
            progress("calibrating", sum(map(len, map(linear_layers, blocks)))) as step,
        ):

            def told(record: LayerRecord) -> None:
                report(record)
                step(f"block {record.block + 1}/{len(blocks)}  {record.layer}")

            records = quantization.run(told)
        return summarize_layers(records, self.inputs.checkpoint.parameters, stored_bits) | {
            "quantize/seconds": sum(phases.seconds.values()),  # of all the processes that a run has had
            "quantize/peak_memory_gb": meter.peak_memory_gb,
            **{f"quantize/{name}_seconds": seconds for name, seconds in phases.seconds.items()},
            "calibration/sha256": sequences.sha256,
            "checkpoint/sha256": self.blocks.sha256,
        }

    def _calibration_mode(self, sequences: Sequences, phases: Phases) -> CalibrationMode:
        """The inputs that `calibration.inputs` asks for."""
        batch_size, calibration = self.inputs.batch_size, self.settings.run.calibration
        activations = CalibrationActivations(
            self.source, sequences.used, batch_size, sequences.held_out, self.memory, phases
        )
        if calibration.inputs == "full_precision":
            key = statistics_key(self.settings, self.inputs)
            return FullPrecisionInputs(activations, StatisticsCache(self.cache, key, self.inputs.device))
        return QuantizedInputs(activations, calibration.true_sequential)

    def evaluate(self) -> tuple[Metrics, Windows]:
        """Perplexity on every text, and the agreement with the unquantized model; and what each window measured."""
        texts = {name: (windows.ids, windows.sha256) for name, windows in self.inputs.windows.items()}
        if not texts:
            return {}, {}
        references = None
        if self.settings.run.evaluation.agreement:
            references = ReferenceCache(self.cache, model_key(self.settings, self.inputs))
        options: dict[str, Any] = {"blocks": self.blocks, "references": references, "memory": self.memory}
        with Meter(self.inputs.device) as meter, progress("evaluating", len(self.source.blocks) + len(texts)) as step:
            measured = BlockwiseEvaluation(self.source, texts, self.inputs.batch_size, **options).run(step)
        metrics: Metrics = {"evaluate/seconds": meter.seconds, "evaluate/peak_memory_gb": meter.peak_memory_gb}
        for name, windows in self.inputs.windows.items():
            metrics |= {
                f"ppl/{name}": perplexity(torch.tensor(measured[name]["nll"], dtype=torch.float64)),
                f"protocol/{name}": windows.protocol,
                f"windows/{name}": len(windows.ids),
                f"sha256/{name}": windows.sha256,
            }
            others = {kind: values for kind, values in measured[name].items() if kind != "nll"}
            metrics |= {f"agreement/{name}/{kind}": fmean(values) for kind, values in others.items()}
        return metrics, measured

    def zero_shot(self) -> Metrics:
        """The accuracies, with the whole model in memory, and why what was skipped was."""
        skipped = {f"skipped/{name}": why for name, why in self.inputs.skipped.items()}
        if not self.inputs.tasks:
            return skipped
        checkpoint, tasks = self.inputs.checkpoint, self.inputs.tasks
        with Meter(self.inputs.device) as meter:
            try:
                model = whole_model(checkpoint, self.settings.run.model, self.inputs.device, self.blocks)
                options: dict[str, Any] = {"length": checkpoint.sequence_length, "batch_size": self.inputs.batch_size}
                limit = self.settings.run.evaluation.limit
                metrics = measure_tasks(model, self.inputs.tokenizer, tasks, limit=limit, **options)
            except Exception as error:
                if not out_of_memory(error):
                    raise
                why = "lm-eval needs the whole model in memory, which ran out: take a larger machine, or batch_size=1"
                metrics = {f"skipped/{task.name}": why for task in tasks}
        return metrics | skipped | {"zero_shot/seconds": meter.seconds}

    def recorded(self) -> Metrics:
        """What the cache had, and what was done when memory ran out."""
        steps = {"memory/steps": "; ".join(self.memory.steps)} if self.memory.steps else {}
        return {"cache/hits": self.cache.hits, "cache/misses": self.cache.misses} | steps

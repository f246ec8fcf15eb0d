"""Quantize a model in one call, calibrated on quantized inputs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerSolver
from runners.models.blocks import BlockSource
from runners.models.memory import Memory
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.calibration_modes import QuantizedInputs
from runners.quantization.layerwise import Quantization
from runners.results.layers import LayerRecord


def quantize(
    source: BlockSource,
    sequences: Tensor,
    batch_size: int,
    solver: LayerSolver,
    spec: GridSpec,
    *,
    true_sequential: bool = False,
    memory: Memory | None = None,
    report: Callable[[LayerRecord], None] = lambda _: None,
    **options: Any,
) -> list[LayerRecord]:
    """The records of all layers; `options` are those of `Quantization`."""
    activations = CalibrationActivations(source, sequences, batch_size, memory=memory)
    return Quantization(QuantizedInputs(activations, true_sequential), solver, spec, **options).run(report)

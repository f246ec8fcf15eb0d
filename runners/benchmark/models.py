"""Whole models with the shapes of OPT and random weights: where the time of a quantization goes.

The time does not depend on what weights and tokens mean, so nothing has to be downloaded.
"""

from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from baselines.gptq import GPTQ
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerSolver
from runners.benchmark.layers import WIDTHS
from runners.models.blocks import InMemoryModel
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.calibration_modes import QuantizedInputs
from runners.quantization.layerwise import Quantization
from runners.timing import Meter, Phases

Size = Literal["125m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b"]  # not 350m, which alone has another architecture
DEPTHS: dict[Size, int] = {"125m": 12, "1.3b": 24, "2.7b": 32, "6.7b": 32, "13b": 40, "30b": 48, "66b": 64}
HEADS: dict[Size, int] = {"125m": 12, "1.3b": 32, "2.7b": 32, "6.7b": 32, "13b": 40, "30b": 56, "66b": 72}
METHODS: dict[str, LayerSolver] = {"gptq": GPTQ(), "quantease": QuantEase()}
BATCH_TOKENS = 16_384  # per forward pass: enough to fill a GPU


def random_opt(size: Size, device: torch.device) -> nn.Module:
    """OPT with random weights: in float16 on a GPU, as it is published; in float32 on a CPU, where half is slow."""
    width = WIDTHS[size]
    config = OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=DEPTHS[size],
        num_attention_heads=HEADS[size],
        max_position_embeddings=2048,
    )
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with torch.device("meta"):  # the weights are drawn below, on the device
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    model.tie_weights()
    return model


def measure_model(size: Size, method: str, sequences: int, length: int, device: torch.device) -> dict[str, Any]:
    """One row of `models.csv`: the seconds of each phase, of all of them, and the peak memory in GB (10^9 bytes)."""
    phases = Phases(device)
    ids = torch.randint(4, 50_000, (sequences, length), generator=torch.Generator().manual_seed(0))
    with Meter(device) as meter:
        with phases.of("load"):
            model = random_opt(size, device)
        batch_size = max(1, BATCH_TOKENS // length)
        activations = CalibrationActivations(InMemoryModel(model), ids, batch_size, phases=phases)
        quantization = Quantization(QuantizedInputs(activations), METHODS[method], GridSpec(3))
        records = quantization.run(lambda _: None)
    parts = {f"{phase}_seconds": value for phase, value in phases.seconds.items()}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "model": f"opt-{size}",
        "parameters": parameters,
        "method": method,
        "sequences": sequences,
        "length": length,
        **parts,
        "seconds": meter.seconds,
        "peak_memory_gb": meter.peak_memory_gb,
        "mean_relative_error": sum(record.relative_error or 0.0 for record in records) / len(records),
    }

"""What a run puts on the disk, computed from the model without its weights, before anything is run.

While a run lasts, each finished block is kept in the format of `runners.quantization.packing`; for other runs on the model
the cache takes the unquantized model's last activations (tokens * width), which agreement needs, and with
`calibration.inputs=full_precision` the input statistics of every block (inputs * inputs of each layer).
"""

from typing import Any

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.grids.levels import LevelGrid
from quantease.grids.uniform import UniformGrid
from quantease.layer import QuantizedLayer
from quantease.sparse import Outliers
from runners.config.settings import Settings
from runners.models.blocks import decoder_blocks, full_name, linear_layers
from runners.models.checkpoint import Model
from runners.quantization.packing import packed_bytes

FULL_PRECISION = "full_precision"  # calibration.inputs


def codes_bytes(skeleton: Any, settings: Settings, outlier_ratio: float) -> int:
    """The size of all finished blocks of a run, but for what a method keeps of single columns, such as AWQ's scales.

    Args:
        skeleton: the model; its weights may be on the meta device.
        outlier_ratio: the share of the weights that the method keeps beside the codes.
    """
    run = settings.run
    own = getattr(run.method.solver, "group_size", None)  # a method may have groups of its own
    layers = [
        (tuple(layer.weight.shape), spec)
        for index, block in enumerate(decoder_blocks(skeleton))
        for name, layer in linear_layers(block).items()
        if (spec := run.spec_of(full_name(index, name))) is not None
    ]
    sizes = {
        (shape, spec): packed_bytes(
            _layer(shape, GridSpec(spec.bits, spec.group_size or own, format=spec.format), outlier_ratio)
        )
        for shape, spec in set(layers)
    }
    return sum(sizes[layer] for layer in layers)


def sequence_bytes(skeleton: Any, model: Model, length: int) -> int:
    """The size of the activations of a sequence between two decoder blocks."""
    dtype = getattr(torch, model.dtype) if model.dtype else skeleton.config.dtype or torch.float32
    return length * skeleton.config.get_text_config().hidden_size * dtype.itemsize


def statistics_bytes(skeleton: Any, held_out: bool) -> int:
    """At most the size of the input statistics of all blocks: layers that share an input have one Hessian, too."""
    columns = [layer.in_features for block in decoder_blocks(skeleton) for layer in linear_layers(block).values()]
    return sum(4 * inputs * inputs * (1 + held_out) + 4 * inputs for inputs in columns)


def _layer(shape: tuple[int, ...], spec: GridSpec, outlier_ratio: float) -> QuantizedLayer:
    """A quantized layer (out, in) of these sizes, without any values."""
    rows, columns = shape
    group_size = min(spec.group_size or columns, columns)
    groups = -(-columns // group_size)
    scale, group = _empty(rows, groups), _empty(columns, dtype=torch.int64)
    if (kind := spec.format) is None:
        grid = UniformGrid(spec, scale, _empty(rows, groups), group)
    else:
        grid = LevelGrid(spec, kind, scale, group, _empty() if kind.scales_of_tensor else None)
    count = round(outlier_ratio * rows * columns)
    place = _empty(count, dtype=torch.int64)
    outliers = Outliers(place, place, _empty(count)) if count else None
    return QuantizedLayer(_empty(rows, columns, dtype=torch.uint8), grid, outliers)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")

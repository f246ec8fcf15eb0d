"""Layers that other tools have packed give, bit for bit, the weights that those tools make of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from runners.formats.detect import packed_layers

GOLDEN = Path(__file__).parent / "golden"
LAYER = "model.layers.0.mlp.down_proj"
SIDE = 8  # bits of a byte


def cases() -> list[Any]:
    """One parameter for each layer of each file."""
    found = []
    for file in sorted(GOLDEN.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            configs = json.loads(opened.metadata()["configs"])
        found += [pytest.param(file, name, config, id=f"{file.stem}-{name}") for name, config in configs.items()]
    return found


def tensors_of(file: Path, case: str) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        names = [name for name in opened.keys() if name.startswith(f"{case}/")]  # noqa: SIM118 - not a dictionary
        return {name.removeprefix(f"{case}/"): opened.get_tensor(name) for name in names}


def write_case(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], key: str = "quantization_config"
) -> None:
    """The one layer as a checkpoint would hold it."""
    named = {f"{LAYER}.{part}": tensor for part, tensor in tensors.items() if part != "expected"}
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({key: config}))


@pytest.mark.parametrize(("file", "case", "config"), cases())
def test_the_weights_are_those_of_the_tool(file: Path, case: str, config: dict[str, Any], tmp_path: Path) -> None:
    tensors = tensors_of(file, case)
    write_case(tmp_path, tensors, config)
    layers = packed_layers(tmp_path, [tmp_path / "model.safetensors"])
    assert list(layers) == [f"{LAYER}.weight"]
    layer = layers[f"{LAYER}.weight"]
    expected = tensors.pop("expected")
    assert layer.shape == tuple(expected.shape)
    assert torch.equal(layer.weight().to(expected.dtype), expected)
    assert layer.parts.bits == SIDE * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_the_golden_files_are_small() -> None:
    assert sum(file.stat().st_size for file in GOLDEN.iterdir()) < 1e6

"""Write awq.safetensors: layers that AutoAWQ has packed, and its own dequantized weights.

    pip download --no-deps --no-binary :all: autoawq==0.2.9; unpack it; pip install torch
    AUTOAWQ=FOLDER python tests/formats/golden/make_awq.py

Of AutoAWQ the files of the layout alone are loaded (`WQLinear_GEMM` and `packing_utils`): the package as a whole needs
versions of transformers that are gone. Scales and zero points are made here, as they belong to the method.
"""

import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

CASES = [(16, 32, 64), (128, 64, 128), (-1, 32, 48)]  # group size, out, in


def load(name: str) -> Any:
    """A module of AutoAWQ from its file."""
    file = Path(os.environ["AUTOAWQ"]) / (name.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def layout() -> tuple[Any, Any]:
    """The layer of the layout, and the function that dequantizes it."""
    for package in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []  # pyright: ignore[reportAttributeAccessIssue]
    helpers = types.ModuleType("awq.utils.utils")
    helpers.get_best_device = lambda: "cpu"  # pyright: ignore[reportAttributeAccessIssue]
    tried = types.ModuleType("awq.utils.module")
    tried.try_import = lambda name: (None, f"no {name}")  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"awq.utils.utils": helpers, "awq.utils.module": tried}
    dequantize = load("awq.utils.packing_utils").dequantize_gemm
    return load("awq.modules.linear.gemm").WQLinear_GEMM, dequantize


def main() -> None:
    """Write all cases into one file, the configs into its metadata."""
    torch.manual_seed(0)
    cls, dequantize = layout()
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for size, out, columns in CASES:
        linear = nn.Linear(columns, out, bias=False).half()
        grouped = linear.weight.data.reshape(out, -1, columns if size == -1 else size).float()
        low, high = grouped.aminmax(dim=-1)
        scale = ((high - low) / 15).half()
        zero = torch.round(-low / scale.float()).clamp(0, 15).half()
        # What quantization leaves in the layer before it is packed: the weights on the grid.
        codes = torch.round(grouped / scale.float()[..., None] + zero.float()[..., None]).clamp(0, 15)
        linear.weight.data = ((codes - zero.float()[..., None]) * scale.float()[..., None]).reshape(out, columns).half()
        layer = cls.from_linear(linear, 4, size if size != -1 else columns, scales=scale.T, zeros=zero.T)
        name = f"gemm-{size}-{out}x{columns}"
        parts = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales.contiguous()}
        real = columns if size == -1 else size
        parts["expected"] = dequantize(layer.qweight, layer.qzeros, layer.scales, 4, real).T.contiguous()
        tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        configs[name] = {
            "quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True,
            "modules_to_not_convert": None,
        }  # fmt: skip
    save_file(tensors, Path(__file__).with_name("awq.safetensors"), {"configs": json.dumps(configs)})


if __name__ == "__main__":
    main()

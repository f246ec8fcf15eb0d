"""Write compressed_tensors.safetensors: layers that compressed-tensors has packed, and its own dequantized weights.

    pip install compressed-tensors==0.20.0 torch transformers    (in an environment of its own)
    python tests/formats/golden/make_compressed_tensors.py

With OLD=FOLDER, where compressed-tensors 0.9.4 is unpacked, also the packing of its time, which left bits of a word empty.
Scales and zero points are made here, as they belong to the method; codes, packing and dequantization are the tool's.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from torch import Tensor

OUT, IN, GROUP = 24, 64, 16
CASES = [  # format, bits, strategy, symmetric, dtype
    *(("pack-quantized", bits, "channel", True, torch.float16) for bits in (2, 3, 4, 5, 6, 7, 8)),
    *(("pack-quantized", bits, "group", False, torch.bfloat16) for bits in (2, 3, 4, 8)),
    ("pack-quantized", 4, "channel", False, torch.float16),
    ("pack-quantized", 3, "group", True, torch.float32),
    ("pack-quantized", 4, "tensor", True, torch.float16),
    ("naive-quantized", 8, "channel", True, torch.float16),
    ("naive-quantized", 8, "group", False, torch.bfloat16),
    ("naive-quantized", 4, "tensor", True, torch.float16),
    ("int-quantized", 8, "channel", False, torch.float16),
]


def grid(weight: Tensor, args: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales and zero points (out, groups) that span each group's range."""
    grouped = {"channel": (OUT, 1, IN), "group": (OUT, IN // GROUP, GROUP), "tensor": (1, 1, OUT * IN)}[args.strategy]
    low, high = weight.float().reshape(grouped).aminmax(dim=-1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    levels = 2**args.num_bits - 1
    if args.symmetric:
        scale = (torch.maximum(-low, high) * 2 / levels).to(dtype)
        return (scale if args.strategy != "tensor" else scale.reshape(1)), torch.zeros_like(scale, dtype=torch.int8)
    scale = ((high - low) / levels).to(dtype)
    return scale, (torch.round(-low / scale.float()) - 2 ** (args.num_bits - 1)).clamp(-128, 127).to(torch.int8)


def case(layout: str, bits: int, strategy: str, symmetric: bool, dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """The tensors of one layer, with `expected`, and its config."""
    grouped = {"strategy": strategy, "group_size": GROUP if strategy == "group" else None}
    options: dict[str, Any] = {"num_bits": bits, "symmetric": symmetric} | grouped
    args = QuantizationArgs(**options)
    whole: dict[str, Any] = {"targets": ["Linear"], "weights": args, "format": layout}
    scheme = QuantizationScheme(**whole)
    weight = torch.randn(OUT, IN).to(dtype)
    scale, zero = grid(weight, args, dtype)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    compressor: Any = BaseCompressor.get_value_from_registry(layout)
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(packed), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json(exclude_none=True))},
        "ignore": ["lm_head"],
    }
    return packed | {"expected": expected}, config


def old_case(folder: Path) -> tuple[dict[str, Tensor], Any]:
    """3 bits, ten codes to a word, with act-order: as case, of version 0.9.4."""
    file = folder / "compressed_tensors" / "compressors" / "quantized_compressors" / "pack_quantized.py"
    source = file.read_text()
    functions = source[source.index("def pack_to_int32") :]
    namespace: dict[str, Any] = {}
    # Not imported: the module needs what other libraries no longer have.
    exec("import math, torch, numpy as np\nfrom typing import *\n" + functions, namespace)
    bits, dtype, out = 3, torch.float16, 40  # rows that fill words of ten codes: it cannot pack others
    codes = torch.randint(-4, 4, (out, IN), dtype=torch.int8)
    zero = torch.randint(-4, 4, (out, IN // GROUP), dtype=torch.int8)
    scale, group = torch.rand(out, IN // GROUP).to(dtype), torch.randperm(IN) // GROUP
    packed = {
        "weight_packed": namespace["pack_to_int32"](codes, bits),
        "weight_scale": scale,
        "weight_zero_point": namespace["pack_to_int32"](zero, bits, packed_dim=0).contiguous(),
        "weight_g_idx": group.int(),
        "weight_shape": torch.tensor([out, IN]),
    }
    back = namespace["unpack_from_int32"](packed["weight_packed"], bits, torch.Size([out, IN]))
    # As `_dequantize` of that version, for columns in any order: of the group that each column has.
    expected = (back.to(dtype) - zero.to(dtype)[:, group]) * scale[:, group]
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP}
    groups = {"group_0": {"targets": ["re:.*down_proj"], "weights": weights | {"actorder": "group"}}}
    config = {"format": "pack-quantized", "config_groups": groups, "quant_method": "compressed-tensors"}
    return packed | {"expected": expected}, config


def main() -> None:
    """Write all cases into one file, the configs into its metadata."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    configs = {}
    for settings in CASES:
        name = "-".join(str(value).removeprefix("torch.") for value in settings)
        mine, configs[name] = case(*settings)
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in mine.items()}
    if "OLD" in os.environ:
        mine, configs["old"] = old_case(Path(os.environ["OLD"]))
        tensors |= {f"old/{part}": tensor.contiguous() for part, tensor in mine.items()}
    save_file(tensors, Path(__file__).with_name("compressed_tensors.safetensors"), {"configs": json.dumps(configs)})


if __name__ == "__main__":
    main()

"""Write bitsandbytes.safetensors: layers that bitsandbytes has quantized to 4 bits, and its own dequantized weights.

pip install bitsandbytes==0.50.2 torch    (in an environment of its own; no GPU is needed)
python tests/formats/golden/make_bitsandbytes.py
"""

import json
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from torch import Tensor

CASES = [  # type, block size, whether absmax is quantized too, dtype, shape
    ("nf4", 64, False, torch.float16, (24, 64)),
    ("nf4", 64, True, torch.bfloat16, (24, 64)),
    (
        "nf4",
        128,
        True,
        torch.float32,
        (136, 256),
    ),  # more than 256 blocks: several blocks of blocks, the last one not full
    ("nf4", 64, False, torch.float32, (5, 27)),  # the last block is not full, nor is the last byte
    ("fp4", 64, False, torch.float16, (24, 64)),
    ("fp4", 64, True, torch.bfloat16, (24, 64)),
]


def main() -> None:
    """Write all cases into one file, the configs into its metadata."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for kind, size, nested, dtype, shape in CASES:
        weight = (0.02 * torch.randn(*shape)).to(dtype)
        packed, state = quantize_4bit(weight, blocksize=size, compress_statistics=nested, quant_type=kind)
        name = (
            f"{kind}-{size}-{'nested' if nested else 'plain'}-{str(dtype).removeprefix('torch.')}-{shape[0]}x{shape[1]}"
        )
        parts = {"weight": packed} | {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        parts["expected"] = dequantize_4bit(packed, state)
        tensors |= {f"{name}/{part}": tensor.contiguous() for part, tensor in parts.items()}
        configs[name] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested,
        }
    save_file(tensors, Path(__file__).with_name("bitsandbytes.safetensors"), {"configs": json.dumps(configs)})


if __name__ == "__main__":
    main()

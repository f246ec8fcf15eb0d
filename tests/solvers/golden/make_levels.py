"""Make the golden data of tests/solvers/test_level_grids.py: the NF4, MXFP4 and NVFP4 of other people, on one small weight.

The references are bitsandbytes (NF4), torchao (MXFP4, with the scales of the OCP specification) and compressed-tensors
(NVFP4). Only their answers are needed, so they are no dependencies of the project: this script runs in a virtual
environment of its own, on the CPU, in seconds.

    python3.11 -m venv levels-venv
    levels-venv/bin/pip install torch==2.13.0 compressed-tensors==0.20.0 torchao==0.18.0 bitsandbytes==0.50.2
    levels-venv/bin/python tests/solvers/golden/make_levels.py

It writes levels.safetensors beside itself, with the versions it was made with in the metadata:

    weight                  (24, 128), float32: rows of very unequal size, and middles between two levels in some
    nf4.codes, .scale       (24, 128), uint8, and (24, 2), float32: quantize_4bit in blocks of 64
    mxfp4.values, .scale    (24, 128), float32: dequantized, and (24, 4), uint8: the E8M0 bytes of to_mx
    nvfp4.values, .scale    (24, 128), float32: dequantized, and (24, 8), uint8: the E4M3 bytes
    nvfp4.tensor_scale      float32 scalar: generate_gparam
"""

# pyright: reportArgumentType=false
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional  # pyright: ignore[reportMissingImports]
import torch
from compressed_tensors.quantization import FP8_E4M3_DATA, QuantizationArgs  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization.lifecycle.forward import fake_quantize  # pyright: ignore[reportMissingImports]
from compressed_tensors.quantization.utils import (  # pyright: ignore[reportMissingImports]
    calculate_qparams,
    generate_gparam,
)
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor  # pyright: ignore[reportMissingImports]

SEED = 0
PACKAGES = ("bitsandbytes", "torchao", "compressed-tensors", "torch")
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])  # of E2M1, and its largest level


def make_weight() -> Tensor:
    """(24, 128), float32."""
    g = torch.Generator().manual_seed(SEED)
    weight = torch.randn(24, 128, generator=g) * torch.logspace(-3, 0, 24)[:, None]
    # Rows whose groups have a scale of 2^-3 on MXFP4, and all middles of E2M1 with both signs.
    weight[:4] = torch.cat([MIDDLES, -MIDDLES]).repeat(4, 8) / 8
    return weight


def nf4(weight: Tensor) -> dict[str, Tensor]:
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nibbles = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1)
    return {"codes": nibbles.reshape(weight.shape), "scale": state.absmax.reshape(len(weight), -1)}


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    answer = MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, block_size=32)
    scale = answer.scale.view(torch.uint8).reshape(len(weight), -1)
    return {"values": answer.dequantize(torch.float32), "scale": scale}


def nvfp4(weight: Tensor) -> dict[str, Tensor]:
    args = QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        symmetric=True,
        scale_dtype=FP8_E4M3_DATA.dtype,
    )
    tensor_scale = generate_gparam(weight.min(), weight.max())
    groups = weight.reshape(len(weight), -1, 16)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=tensor_scale)
    values = fake_quantize(weight, scale, zero, args, global_scale=tensor_scale)
    stored = scale.to(torch.float8_e4m3fn).view(torch.uint8)
    return {"values": values, "scale": stored, "tensor_scale": tensor_scale.reshape(())}


def main() -> None:
    """Quantize with all three and write the file."""
    weight = make_weight()
    tensors = {"weight": weight}
    for make in (nf4, mxfp4, nvfp4):
        tensors |= {f"{make.__name__}.{key}": value.contiguous() for key, value in make(weight.clone()).items()}
    metadata = {package: version(package) for package in PACKAGES} | {"seed": str(SEED)}
    save_file(tensors, Path(__file__).with_name("levels.safetensors"), metadata)


if __name__ == "__main__":
    main()

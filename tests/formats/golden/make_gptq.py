"""Write gptq.safetensors: layers that GPTQModel has packed, and its own dequantized weights.

    pip download --no-deps gptqmodel==7.7.0; unpack it
    pip install torch transformers logbar threadpoolctl pypcre device-smi tokenicer dill defuser torchao
    PYTHONPATH=FOLDER python tests/formats/golden/make_gptq.py

Scales and zero points are made here, as they belong to the method; codes, packing, the conversion from version 2 to 1 and
dequantization are the tool's.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear  # pyright: ignore[reportMissingImports]
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from torch import Tensor, nn

OUT, IN = 32, 64
CASES = [  # version, bits, group size, symmetric, act-order
    *((version, bits, 16, False, order) for version in (1, 2) for bits in (2, 3, 4, 8) for order in (False, True)),
    *((version, 4, -1, True, False) for version in (1, 2)),
]


def case(version: int, bits: int, size: int, symmetric: bool, order: bool) -> dict[str, Tensor]:
    """The tensors of one layer, with `expected`."""
    columns = size if size != -1 else IN
    group = torch.arange(IN) // columns
    if order:
        group = group[torch.randperm(IN)]
    groups, top = IN // columns, 2**bits - 1
    zero = torch.randint(1, top + 1, (OUT, groups))  # version 1 cannot hold 0
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    scale = (0.01 + 0.05 * torch.rand(OUT, groups)).half()
    codes = torch.randint(0, top + 1, (OUT, IN))
    linear = nn.Linear(IN, OUT, bias=False)
    linear.weight.data = (codes - zero[:, group]).float() * scale.float()[:, group]
    options: dict[str, Any] = {"bits": bits, "group_size": size, "sym": symmetric, "desc_act": order}
    layer: Any = TorchLinear(in_features=IN, out_features=OUT, **options)
    layer.pack_original(linear, scale.float(), zero.float(), group.int())
    layer.post_init()
    expected = layer.dequantize_weight().T.contiguous()
    if version == 1:
        convert_gptq_v2_to_v1_format_module(layer, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    parts = {part: getattr(layer, part).clone().contiguous() for part in ("qweight", "qzeros", "scales", "g_idx")}
    return parts | {"expected": expected}


def main() -> None:
    """Write all cases into one file, the configs into its metadata."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for version, bits, size, symmetric, order in CASES:
        name = f"v{version}-{bits}-{size}{'-symmetric' * symmetric}{'-act_order' * order}"
        tensors |= {f"{name}/{part}": tensor for part, tensor in case(version, bits, size, symmetric, order).items()}
        configs[name] = {
            "quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric, "desc_act": order,
            "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version],
        }  # fmt: skip
    save_file(tensors, Path(__file__).with_name("gptq.safetensors"), {"configs": json.dumps(configs)})


if __name__ == "__main__":
    main()

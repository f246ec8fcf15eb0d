"""Make the golden data of tests/solvers/test_golden.py: GPTQ as llm-compressor computes it, on one small layer.

llm-compressor is an implementation by other people, so what it answers checks our reading of the paper, which our own
transcriptions of the equations cannot. Only its answers are needed, so it is not a dependency of the project: this
script runs in a virtual environment of its own, on the CPU, in seconds.

    python3.11 -m venv llmcompressor-venv
    llmcompressor-venv/bin/pip install llmcompressor==0.14.0.1
    llmcompressor-venv/bin/python tests/solvers/golden/make_gptq.py

It writes gptq.safetensors beside itself, with the versions it was made with in the metadata:

    weight                      (24, 128), float16
    inputs                      (512, 128), float16: the calibration tokens, correlated and of very unequal size
    <case>.scale, .zero_point   (24, groups), from llm-compressor's min-max observer. Its codes are signed: a code of
                                0 here is 2^(bits - 1) in this project, and so is a zero point
    <case>.dequantized          (24, 128), float32: the answer of its GPTQ

Everything is computed in float32; the weight and the inputs are float16 numbers only to be stored exactly. No input is
dead, that is zero in all tokens: llm-compressor sets the weights of such inputs to zero, while this project rounds them
to nearest.
"""

# pyright: reportArgumentType=false
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight  # pyright: ignore[reportMissingImports]
from llmcompressor.modifiers.gptq.helpers import (  # pyright: ignore[reportMissingImports]
    accumulate_hessian,
    make_empty_hessian,
    prepare_batch,
)
from llmcompressor.observers import Observer  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from torch import Tensor

SEED = 0
OUT_FEATURES, IN_FEATURES, TOKENS = 24, 128, 512
TOKENS_PER_BATCH = 128  # the Hessian is accumulated over several batches, as in a real calibration
BLOCK_SIZE = 32  # smaller than the layer, so that errors are also passed on from one block to the next
DAMPING = 0.01

CASES = {
    "bits4": QuantizationArgs(num_bits=4, symmetric=False, strategy="channel"),
    "bits3": QuantizationArgs(num_bits=3, symmetric=False, strategy="channel"),
    "bits4_symmetric": QuantizationArgs(num_bits=4, symmetric=True, strategy="channel"),
    "bits4_group32": QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32),
    "bits4_actorder": QuantizationArgs(num_bits=4, symmetric=False, strategy="channel", actorder="weight"),
    "bits4_group32_actorder": QuantizationArgs(
        num_bits=4, symmetric=False, strategy="group", group_size=32, actorder="weight"
    ),
}
PACKAGES = ("llmcompressor", "compressed-tensors", "torch")


def make_layer() -> tuple[Tensor, Tensor]:
    """The weight (out, in) and the calibration tokens (tokens, in), in float16."""
    g = torch.Generator().manual_seed(SEED)
    mixing = torch.randn(IN_FEATURES, IN_FEATURES, generator=g) / IN_FEATURES**0.5
    sizes = torch.logspace(0.5, -1, IN_FEATURES)[torch.randperm(IN_FEATURES, generator=g)]
    inputs = torch.randn(TOKENS, IN_FEATURES, generator=g) @ mixing * sizes
    return torch.randn(OUT_FEATURES, IN_FEATURES, generator=g).half(), inputs.half()


def solve(layer: torch.nn.Linear, inputs: Tensor, args: QuantizationArgs) -> dict[str, Tensor]:
    """llm-compressor's grid and answer, by the calls that its GPTQModifier makes."""
    hessian, count = make_empty_hessian(layer), torch.zeros(())
    for batch in inputs.split(TOKENS_PER_BATCH):
        hessian, count = accumulate_hessian(batch, layer, hessian, count)
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
    weights, hessians, scale, zero_point, global_scale = prepare_batch(
        [layer], [observer(layer.weight).get_qparams()], {layer: hessian}, {layer: count}
    )
    dequantized, _, fell_back = quantize_weight(
        weights, hessians, scale, zero_point, global_scale, args, blocksize=BLOCK_SIZE, percdamp=DAMPING
    )
    assert not fell_back.any(), "the Hessian could not be factorized, and the answer is round-to-nearest"
    return {"scale": scale[0], "zero_point": zero_point[0], "dequantized": dequantized[0]}


def main() -> None:
    """Solve all cases and write the file."""
    weight, inputs = make_layer()
    layer = torch.nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False)
    layer.weight.data = weight.float()
    tensors = {"weight": weight, "inputs": inputs}
    with torch.no_grad():
        for name, args in CASES.items():
            answer = solve(layer, inputs.float(), args)
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in answer.items()}
    metadata = {package: version(package) for package in PACKAGES}
    metadata |= {"damping": str(DAMPING), "block_size": str(BLOCK_SIZE), "seed": str(SEED)}
    save_file(tensors, Path(__file__).with_name("gptq.safetensors"), metadata)


if __name__ == "__main__":
    main()

"""The harness over every family: all linear layers of all blocks are quantized, nothing else is touched, in sequence."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from runners.blocks import decoder_blocks, linear_layers
from runners.errors import InputError
from runners.quantization import LayerRecord, bits_per_weight, quantize
from tests.families import FAMILIES, random_ids, random_model


def run(model, solver: LayerSolver, bits: int = 3, true_sequential: bool = False) -> list[LayerRecord]:
    reported: list[LayerRecord] = []
    records = quantize(
        model,
        random_ids(6),
        solver,
        GridSpec(bits),
        true_sequential=true_sequential,
        batch_size=4,
        report=reported.append,
    )
    assert records == reported
    return records


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_quantized_and_nothing_else(family: str) -> None:
    model = random_model(family)
    before = copy.deepcopy(model.state_dict())
    records = run(model, RTN())
    quantized = set()
    for index, block in enumerate(decoder_blocks(model)):
        for name, layer in linear_layers(block).items():
            quantized.add(id(layer.module.weight))
            assert all(len(row.unique()) <= 8 for row in layer.weight), f"{name} in block {index}"
    assert len(quantized) == len(records)
    for name, parameter in model.named_parameters():
        assert (id(parameter) in quantized) != torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("family", ["opt", "falcon-7b", "gpt2", "gemma2"])
def test_the_recorded_error_is_the_error_of_the_layers_outputs(family: str) -> None:
    """Of the first group of layers, which sees the same inputs before and after: ||W X - W_hat X||^2 / ||W X||^2."""
    model = random_model(family)
    original = copy.deepcopy(model)
    record = run(model, GPTQ())[0]
    inputs: list[Tensor] = []
    module = linear_layers(decoder_blocks(original)[0])[record.layer].module
    module.register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, -2)))
    for batch in random_ids(6).split(4):
        original(batch, use_cache=False)
    x = torch.cat(inputs).double()
    weight = linear_layers(decoder_blocks(original)[0])[record.layer].weight.double()
    changed = linear_layers(decoder_blocks(model)[0])[record.layer].weight.double()
    expected = ((weight - changed) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert record.relative_error == pytest.approx(expected.item(), rel=1e-4)


@dataclass(frozen=True)
class Spy:
    """Rounds to nearest and keeps the Hessians it was given."""

    hessians: list[Tensor] = field(default_factory=list)

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.hessians.append(problem.hessian.clone())
        return RTN().solve(problem, spec)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_block_is_calibrated_on_what_the_quantized_blocks_before_it_feed_it(true_sequential: bool) -> None:
    model, spy = random_model("llama"), Spy()
    original = copy.deepcopy(model)
    records = run(model, spy, 2, true_sequential)
    for index in range(2):
        # What the last layer of the block saw: the blocks before are quantized; of its own, the earlier layers only
        # if the run was truly sequential.
        mixed = copy.deepcopy(model)
        if not true_sequential:
            decoder_blocks(mixed)[index] = copy.deepcopy(decoder_blocks(original)[index])
        inputs: list[Tensor] = []
        down = linear_layers(decoder_blocks(mixed)[index])["mlp.down_proj"].module
        keep: Callable[..., None] = lambda _m, args, inputs=inputs: inputs.append(args[0].flatten(0, -2))
        down.register_forward_pre_hook(keep)
        for batch in random_ids(6).split(4):
            mixed(batch, use_cache=False)
        x = torch.cat(inputs)
        place = [(r.block, r.layer) for r in records].index((index, "mlp.down_proj"))
        torch.testing.assert_close(spy.hessians[place], x.T @ x / len(x), rtol=1e-4, atol=1e-6)


def test_layers_that_share_an_input_are_given_the_same_hessian() -> None:
    model, spy = random_model("llama"), Spy()
    records = run(model, spy)
    by_name = {(r.block, r.layer): h for r, h in zip(records, spy.hessians, strict=True)}
    for block in range(2):
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            assert torch.equal(by_name[block, name], by_name[block, "self_attn.q_proj"])
        assert torch.equal(by_name[block, "mlp.up_proj"], by_name[block, "mlp.gate_proj"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_models_dtype_is_kept_and_the_solver_works_in_float32(dtype: torch.dtype) -> None:
    model = random_model("llama").to(dtype)
    spy = Spy()
    records = run(model, spy)
    assert all(h.dtype == torch.float32 for h in spy.hessians)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert all(0 < record.relative_error < 1 for record in records)


def test_solutions_that_are_not_finite_are_refused() -> None:
    class Broken:
        def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
            answer = RTN().solve(problem, spec)
            answer.grid.scale.fill_(torch.nan)
            return answer

    with pytest.raises(InputError, match=r"Broken gave weights that are not finite for self_attn\.\w+ in block 0"):
        run(random_model("llama"), Broken())


def test_bits_per_weight_is_the_mean_over_weights() -> None:
    def record(out_features: int, in_features: int, bits: float) -> LayerRecord:
        return LayerRecord(0, "x", out_features, in_features, 0.0, 0.0, bits, None, 0, "")

    # 10 x 20 weights at 3 bits and 30 x 20 at 5 bits: (200 * 3 + 600 * 5) / 800.
    assert bits_per_weight([record(10, 20, 3.0), record(30, 20, 5.0)]) == pytest.approx(4.5)

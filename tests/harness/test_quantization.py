"""The harness over every family: all linear layers of all blocks are quantized, nothing else is touched, in sequence."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from runners.errors import InputError
from runners.models.blocks import InMemoryModel, LinearLayer, decoder_blocks, linear_layers
from runners.models.memory import Memory
from runners.quantization.group_solver import GroupSolver, LayerGroup
from runners.quantization.input_statistics import InputStatistics
from runners.results.layers import WARNINGS, LayerRecord, refuse_warnings, summarize_layers
from runners.timing import Phases
from tests.families import FAMILIES, random_ids, random_model
from tests.quantize import quantize


def run(model, solver: LayerSolver, bits: int = 3, true_sequential: bool = False) -> list[LayerRecord]:
    reported: list[LayerRecord] = []
    options: dict[str, Any] = {"true_sequential": true_sequential, "stored_bits": 32, "report": reported.append}
    records = quantize(InMemoryModel(model), random_ids(6), 4, solver, GridSpec(bits), **options)
    assert records == reported
    return records


def block_of(model: Any, index: int) -> Any:
    return decoder_blocks(model)[index]


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
class Spy(LayerSolver):
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
    assert all(0 < (record.relative_error or 0) < 1 for record in records)


@dataclass(frozen=True)
class Broken(LayerSolver):
    """Gives NaN for one layer in each block of OPT, the one that is twice as wide as it is high."""

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        answer = RTN().solve(problem, spec)
        if problem.weight.shape == (64, 32):
            answer.grid.scale.fill_(torch.nan)
        return answer


def test_a_solution_that_is_not_finite_leaves_the_layer_alone_and_says_so() -> None:
    model = random_model("opt")
    before = block_of(model, 0).fc1.weight.clone()
    records = run(model, Broken())
    assert torch.equal(block_of(model, 0).fc1.weight, before)
    left = [record for record in records if record.left_alone]
    assert [(record.block, record.layer) for record in left] == [(0, "fc1"), (1, "fc1")]
    assert all(record.non_finite and record.bits_per_weight == 32 for record in left)
    assert left[0].notes == "Broken gave weights that are not finite"
    figures = summarize_layers(records, 10**6, 32)
    assert (figures["warnings/left_alone"], figures["warnings/non_finite"]) == (2, 2)
    # 4 x 32 x 32 and 32 x 64 weights of a block at 3 + 19 / 32 and 3 + 19 / 64 bits, 64 x 32 at 32.
    expected = (4096 * (3 + 19 / 32) + 2048 * (3 + 19 / 64) + 2048 * 32) / 8192
    assert figures["bits_per_weight"] == pytest.approx(expected)


def test_a_matrix_that_is_kept_in_float32_counts_32_bits() -> None:
    model = random_model("llama").to(torch.bfloat16)
    block_of(model, 1).router = torch.nn.Parameter(torch.ones(4, 32), requires_grad=False)
    block_of(model, 1).table = torch.nn.Parameter(torch.ones(4, 32, dtype=torch.bfloat16), requires_grad=False)
    records = quantize(InMemoryModel(model), random_ids(2), 2, RTN(), GridSpec(3), stored_bits=16)
    assert {record.layer: record.bits_per_weight for record in records if record.left_alone} == {
        "router": 32,
        "table": 16,
    }


def test_a_layer_whose_inputs_are_not_finite_takes_the_fallback_and_the_run_ends_there() -> None:
    model = random_model("llama")
    block_of(model, 0).mlp.up_proj.weight.fill_(1e38)
    reported: list[LayerRecord] = []
    spec = GridSpec(8, scale_bits=32)
    with pytest.raises(InputError, match="activations that leave block 0 are not finite"):
        quantize(InMemoryModel(model), random_ids(6), 4, RTN(), spec, report=reported.append)
    (last,) = (record for record in reported if record.fallback)
    assert (last.layer, last.non_finite, last.relative_error) == ("mlp.down_proj", True, None)
    assert last.notes == "rounded to nearest, as its activations are not finite"


def test_inputs_that_are_always_zero_and_the_smallest_scales_are_counted() -> None:
    model = random_model("opt")
    block = block_of(model, 0)
    block.fc1.weight[:5], block.fc1.bias[:5] = 0, 0  # five outputs that the ReLU leaves at zero for the next layer
    block.fc2.weight[3] = 1e-9
    by_name = {(record.block, record.layer): record for record in run(model, RTN())}
    assert by_name[0, "fc2"].dead_columns >= 5
    assert by_name[0, "fc2"].clipped_scales == 1
    assert by_name[0, "fc1"].dead_columns == 0
    figures = summarize_layers(list(by_name.values()), 10**6, 32)
    assert figures["warnings/dead_columns"] == sum(record.dead_columns for record in by_name.values())
    assert figures["warnings/clipped_scales"] == 1


def test_damping_that_had_to_be_raised_is_counted() -> None:
    model = random_model("opt")
    ones = torch.nn.Parameter(torch.full_like(block_of(model, 0).fc1.weight, 1e-4), requires_grad=False)
    block_of(model, 0).fc1.weight = ones  # all outputs are the same, so the next Hessian has rank one
    block_of(model, 0).fc1.bias.fill_(1.0)
    records = run(model, GPTQ(damping=0.0))
    raised = [record for record in records if record.damping_raised]
    assert (0, "fc2") in {(record.block, record.layer) for record in raised}
    assert all("damping raised from 0 to" in record.notes and record.damping for record in raised)
    assert summarize_layers(records, 10**6, 32)["warnings/damping_raised"] == len(raised)
    assert not any(record.damping_raised for record in run(random_model("opt"), GPTQ()))


@pytest.mark.parametrize("kind", WARNINGS)
def test_a_warning_can_be_an_error(kind: str) -> None:
    record = LayerRecord(4, "fc1", 10, 20)
    refuse_warnings(record)
    with pytest.raises(InputError, match=rf"fc1 in block 4: {kind.replace('_', ' ')}: .* warnings=record"):
        refuse_warnings(replace(record, **{kind: 1}))


def test_the_bits_of_a_model_by_hand() -> None:
    """10 x 20 weights at 3 bits and 30 x 20 at 5; 200 more parameters in 16 bits."""
    layers = [
        LayerRecord(0, "a", 10, 20, bits_per_weight=3.0, outlier_ratio=0.04, relative_error=0.1),
        LayerRecord(0, "b", 30, 20, bits_per_weight=5.0, relative_error=0.3),
    ]
    figures = summarize_layers(layers, 1000, 16)
    assert figures["bits_per_weight"] == pytest.approx((200 * 3 + 600 * 5) / 800)
    assert figures["bits_per_parameter"] == pytest.approx((200 * 3 + 600 * 5 + 200 * 16) / 1000)
    assert figures["outlier_ratio"] == pytest.approx(200 * 0.04 / 800)
    assert figures["layers/mean_relative_error"] == pytest.approx(0.2)


def test_the_parameters_of_a_model_are_all_accounted_for() -> None:
    """Embeddings and head included, tied ones once: an OPT of two blocks, by its own count."""
    model = random_model("opt")
    records = run(model, RTN())
    total = sum(parameter.numel() for parameter in model.parameters())  # tied parameters appear once
    quantized = sum(record.out_features * record.in_features for record in records)
    figures = summarize_layers(records, total, 32)
    expected = figures["bits_per_weight"] * quantized + 32 * (total - quantized)
    assert figures["bits_per_parameter"] * total == pytest.approx(expected)
    assert figures["bits_per_weight"] < figures["bits_per_parameter"] < 32


@pytest.mark.parametrize("solver", [RTN(), GPTQ(), QuantEase(num_iters=4), QuantEase(4, init=GPTQ())], ids=str)
def test_layers_that_share_an_input_are_solved_as_one_with_the_same_result(
    solver: LayerSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = random_model("llama"), random_model("llama")
    records = run(together, solver)
    monkeypatch.setattr(type(solver), "rows_independent", False)
    expected = run(alone, solver)
    assert [(r.block, r.layer, r.out_features) for r in records] == [
        (r.block, r.layer, r.out_features) for r in expected
    ]
    for mine, theirs in zip(records, expected, strict=True):
        assert mine.relative_error == pytest.approx(theirs.relative_error, rel=2e-2)  # ties
        assert mine.bits_per_weight == theirs.bits_per_weight


def test_methods_that_look_at_all_rows_are_given_each_layer_alone() -> None:
    shapes: list[tuple[int, ...]] = []

    class Looks(Spy):
        def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
            shapes.append(tuple(problem.weight.shape))
            return RTN().solve(problem, spec)

    records = run(random_model("llama"), Looks())
    assert shapes == [(record.out_features, record.in_features) for record in records]


def test_a_layer_worse_than_rounding_on_held_out_sequences_is_said_so() -> None:
    """GPTQ without damping on one calibration token, which says nothing about the others."""
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    for hessian, worse in ((x[:4].T @ x[:4] / 4, True), (x.T @ x / 256, False)):
        module = torch.nn.Linear(32, 8, bias=False)
        module.weight.data.copy_(weight)
        statistics = InputStatistics(hessian, x.abs().mean(0), held_out=x.T @ x / 256)
        group = LayerGroup(4, {"fc1": LinearLayer(module)}, statistics)
        memory, phases = Memory(), Phases(torch.device("cpu"))
        solver = GroupSolver(GPTQ(damping=1e-3), GridSpec(3), 32, memory, phases, lambda: None)
        (solved,) = solver.solve(group)
        assert solved.record.worse_than_rounding == worse
        assert ("held-out error" in solved.record.notes) == worse
        if worse:
            with pytest.raises(InputError, match=r"worse than rounding: True .*rounding to nearest is 0\.\d+"):
                refuse_warnings(solved.record)

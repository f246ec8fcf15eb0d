"""Fused experts as linear layers: read, walked, calibrated, quantized, counted and resumed as all others."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease.grid import GridSpec
from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.blocks import InMemoryModel, check_coverage, decoder_blocks, linear_layers, other_matrices
from runners.models.checkpoint import Model, load, open_checkpoint
from runners.models.experts import own_experts, routers, take_apart
from runners.models.shards import Shards
from runners.models.streaming import StreamedModel, open_model
from runners.models.walk_check import check_walk
from runners.quantization.input_statistics import input_groups, passes_in_sequence
from runners.quantization.measuring import input_statistics
from runners.results.layers import ROUTER_NOTE, LayerRecord, summarize_layers
from runners.run.experiment import run_cell
from tests.conftest import ToySettings
from tests.experts.conftest import MATRICES, without_tokens
from tests.family_zoo import small_model, token_ids
from tests.harness.test_resume import LIVES, codes, live, measured, undisturbed
from tests.quantize import quantize

CPU = torch.device("cpu")
SPEC = GridSpec(3)


def opened(folder: Path) -> StreamedModel:
    model = Model("experts", str(folder))
    source = open_model(open_checkpoint(model), model, CPU)
    assert isinstance(source, StreamedModel)
    return source


def own_model(folder: Path) -> Any:
    """As transformers loads and runs it, without anything of ours."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", experts_implementation="eager").eval()


def moe_block(source: Any) -> int:
    return next(i for i, block in enumerate(source.blocks) if any("experts." in name for name in linear_layers(block)))


@torch.no_grad()
def test_the_walk_is_the_own_forward_pass_bit_for_bit(experts_model: Path) -> None:
    source, ids = opened(experts_model), token_ids(4, 24)
    rounding = check_walk(source, ids)
    assert rounding.same_batch == 0
    walk = BlockActivations(source, ids, 2)
    for index in range(len(source.blocks)):
        with source.open_block(index):
            walk.advance(index)
    walked = torch.cat([walk.logits(hidden) for hidden in walk.hidden])
    own = own_model(experts_model)
    assert torch.equal(walked, torch.cat([own(part, use_cache=False).logits for part in ids.split(2)]))


def test_tensors_of_each_expert_are_streamed_into_what_transformers_loads(experts_model: Path) -> None:
    stored = Shards.of(experts_model).file_of
    assert any(".experts.3." in name for name in stored)
    assert len(set(stored.values())) > 3
    source, own = opened(experts_model), own_model(experts_model)
    for index, theirs in enumerate(decoder_blocks(own)):
        assert all(parameter.is_meta for parameter in source.blocks[index].parameters())
        with source.open_block(index) as block:
            mine = block.state_dict()
            assert mine.keys() == theirs.state_dict().keys()
            assert all(torch.equal(mine[name], weight) for name, weight in theirs.state_dict().items())
        assert all(parameter.is_meta for parameter in source.blocks[index].parameters())


def test_a_checkpoint_without_the_tensor_of_one_expert_is_refused(experts_model: Path, tmp_path: Path) -> None:
    weights: dict[str, Tensor] = {}
    for file in Shards.of(experts_model).files:
        weights |= load_file(file)
    lost = next(name for name in weights if ".experts.2." in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((experts_model / "config.json").read_bytes())
    model = Model("experts", str(tmp_path))
    with pytest.raises(InputError, match=r"the weights in .* do not fit its config\.json"):
        open_model(open_checkpoint(model), model, CPU)


def test_a_change_of_a_layer_changes_the_output_of_its_expert_alone(experts_model: Path) -> None:
    model = load(open_checkpoint(Model("experts", str(experts_model))), Model("experts", str(experts_model)), CPU)
    source = InMemoryModel(model)
    block = source.blocks[moe_block(source)]
    layers = linear_layers(block)
    before = {name: layer.weight.clone() for name, layer in layers.items()}
    for name in before:
        layers[name].replace(torch.full_like(before[name], 0.5))
        unlike = [other for other, layer in layers.items() if not torch.equal(layer.weight, before[other])]
        assert unlike == [name]
        layers[name].replace(before[name])


def routed(source: Any, ids: Tensor, index: int) -> list[tuple[Tensor, Tensor]]:
    """What the experts of a block receive from its router: hidden states and the experts of each token."""
    seen: list[tuple[Tensor, Tensor]] = []
    block = source.blocks[index]
    handle = block.mlp.experts.register_forward_pre_hook(lambda _module, args: seen.append((args[0], args[1])))
    source.model(ids, use_cache=False)
    handle.remove()
    return seen


@torch.no_grad()
def test_each_expert_has_the_statistics_of_the_tokens_that_are_routed_to_it(experts_model: Path) -> None:
    model, ids = own_model(experts_model), token_ids(6, 24)
    source = InMemoryModel(model)
    index = moe_block(source)
    ((hidden, chosen),) = routed(source, ids, index)
    walk = BlockActivations(source, ids, 4)
    for earlier in range(index):
        walk.advance(earlier)
    measured_groups = dict(input_statistics(walk, index, input_groups(walk, index)))
    block: Any = source.blocks[index]
    experts = block.mlp.experts
    total = 0
    for expert in range(experts.down_proj.shape[0]):
        x = hidden[(chosen == expert).any(1)].double()
        total += len(x)
        first = measured_groups[f"mlp.experts.{expert}.gate_proj", f"mlp.experts.{expert}.up_proj"]
        assert (first.tokens, first.of_tokens) == (len(x), ids.numel())
        torch.testing.assert_close(first.hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        gate, up = (x @ experts.gate_up_proj[expert].double().T).chunk(2, 1)
        inner = experts.act_fn(gate) * up
        down = measured_groups[f"mlp.experts.{expert}.down_proj",]
        torch.testing.assert_close(down.hessian.double(), inner.T @ inner / len(x), rtol=1e-4, atol=1e-6)
    assert total == chosen.numel()  # every token is seen by as many experts as it is routed to


def test_groups_are_in_the_order_of_the_experts_and_true_sequential_takes_them_together(experts_model: Path) -> None:
    source = opened(experts_model)
    index = moe_block(source)
    walk = BlockActivations(source, token_ids(1, 2), 1)  # two tokens: some expert is not reached
    for earlier in range(index):
        with source.open_block(earlier):
            walk.advance(earlier)
    with source.open_block(index):
        groups = input_groups(walk, index)
        passes = passes_in_sequence(walk, index, groups)
        reached = dict(input_statistics(walk, index, groups))
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(linear_layers(source.blocks[index]))
    together = [group for group in passes if len(group) > 1]
    assert [group[0][0].rpartition(".")[2] for group in together] == ["gate_proj", "down_proj"]
    assert [int(group[0].split(".")[2]) for group in together[1]] == list(range(len(together[1])))
    assert len(passes) < 12
    assert 0 < len(reached) < len(groups)


def test_every_matrix_is_a_layer_or_a_router(experts_model: Path) -> None:
    source = opened(experts_model)
    records = quantize(source, token_ids(6, 24), 4, RTN(), SPEC, stored_bits=32.0)
    for index, block in enumerate(source.blocks):
        mine = [record for record in records if record.block == index]
        matrices = {name: p.numel() for name, p in block.named_parameters() if p.ndim >= MATRICES}
        assert sum(record.out_features * record.in_features for record in mine) == sum(matrices.values())
        left = {record.layer for record in mine if record.left_alone}
        assert left == routers(block) == other_matrices(block).keys()
        assert left <= {"mlp.gate.weight"}
        assert {record.notes for record in mine if record.left_alone} <= {ROUTER_NOTE}
    assert sum(record.left_alone for record in records) >= 2
    assert check_coverage(source.model) is None
    figures = summarize_layers(records, 10**6, 32)
    assert figures["bits_per_weight"] < 6  # narrow layers: half of it is scales
    assert figures["warnings/fallback"] == 0


def test_quantized_experts_are_on_the_grid_and_the_router_is_untouched(experts_model: Path) -> None:
    model, before = own_model(experts_model), own_model(experts_model).state_dict()
    model.requires_grad_(False)
    quantize(InMemoryModel(model), token_ids(6, 24), 4, GPTQ(), SPEC)
    index = moe_block(InMemoryModel(model))
    for name, weight in model.state_dict().items():
        if f"layers.{index}." not in name or weight.ndim < MATRICES or name.endswith("mlp.gate.weight"):
            is_meant_to_stay = ".layers." not in name or weight.ndim < MATRICES or name.endswith("mlp.gate.weight")
            assert torch.equal(weight, before[name]) == is_meant_to_stay, name
        elif name.endswith(("gate_up_proj", "down_proj")):
            assert all(len(row.unique()) <= 8 for row in weight.flatten(0, -2))


def few_tokens(fallback: str, count: int) -> tuple[Any, Any, list[LayerRecord]]:
    """A DeepSeek-V3 before and after; no token is routed to expert 1 of block 2."""
    torch.manual_seed(0)
    model, before = small_model("deepseek_v3"), small_model("deepseek_v3")
    for one in (model, before):
        one.requires_grad_(False)
        without_tokens(one, 2, 1)
    options: dict[str, Any] = {"stored_bits": 32.0, "fallback": fallback}
    return before, model, quantize(InMemoryModel(model), token_ids(count, 24), 4, GPTQ(), SPEC, **options)


def test_an_expert_without_tokens_is_rounded_left_or_refused() -> None:
    names = [f"mlp.experts.1.{kind}_proj" for kind in ("gate", "up", "down")]
    before, rounded, records = few_tokens("rtn", 6)
    marked = [record for record in records if record.fallback]
    assert [(record.block, record.layer) for record in marked] == [(2, name) for name in names]
    assert all(record.tokens == 0 and not record.left_alone and record.bits_per_weight < 16 for record in marked)
    weights = [model.model.layers[2].mlp.experts.down_proj[1] for model in (before, rounded)]
    assert not torch.equal(*weights)
    assert all(len(row.unique()) <= 8 for row in weights[1])
    before, kept, records = few_tokens("keep", 6)
    marked = [record for record in records if record.fallback]
    assert [record.layer for record in marked] == names
    assert all(record.left_alone and record.bits_per_weight == 32 for record in marked)
    assert torch.equal(*(model.model.layers[2].mlp.experts.down_proj[1] for model in (before, kept)))
    with pytest.raises(InputError, match=r"mlp\.experts\.1\.gate_proj in block 2 cannot be calibrated: no calibration"):
        few_tokens("error", 6)


def test_transformers_own_experts_run_where_they_are_asked_for() -> None:
    model, ids = small_model("mixtral"), token_ids(2, 12)
    take_apart(model)
    take_apart(model)  # which changes nothing more
    seen: list[str] = []
    layers = linear_layers(decoder_blocks(model)[0])
    layers["mlp.experts.0.down_proj"].module.register_forward_pre_hook(lambda *_: seen.append("seen"))
    apart = model(ids, use_cache=False).logits
    assert seen == ["seen"]
    with own_experts(model):
        assert torch.equal(model(ids, use_cache=False).logits, apart)
    assert seen == ["seen"]


def test_full_precision_statistics_are_shared_between_methods(toy_settings: ToySettings, experts_model: Path) -> None:
    asked = (f"model.path={experts_model}", "calibration.inputs=full_precision", "method=gptq")
    first, second = run_cell(toy_settings(*asked)), run_cell(toy_settings(*asked, "bits=4"))
    assert first["status"] == second["status"] == "done"
    assert second["cache/hits"] > first["cache/hits"]
    without = run_cell(toy_settings(*asked, "bits=4", "cache=null", "study=other", "keep_checkpoint=never"))
    assert without["layers/mean_relative_error"] == second["layers/mean_relative_error"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="truncates files through /proc")
def test_a_run_that_is_killed_goes_on_and_ends_with_the_same_codes(
    toy_settings: ToySettings, experts_model: Path, tmp_path: Path
) -> None:
    def settings(name: str) -> Any:
        where = (f"results={tmp_path / name}", f"cache={tmp_path / 'none'}", "keep_checkpoint=always")
        return toy_settings(f"model.path={experts_model}", "method=gptq", *where)

    calm = settings("calm")
    expected = undisturbed(calm)
    run, ends = settings("killed"), list[int | None]()
    for write in (5, 3, 3, None):
        process = LIVES.Process(target=live, args=(run, write))
        process.start()
        process.join()
        ends.append(process.exitcode)
    assert ends[0] == -signal.SIGKILL
    assert ends[-1] == 0
    row = json.loads((run.folder / "metrics.json").read_text())
    assert measured(row) == measured(expected)
    assert codes(run) == codes(calm)
    with safe_open(next((run.folder / "checkpoint").glob("block-*2.safetensors")), "pt") as file:
        assert any(name.startswith("mlp.experts.3.up_proj.codes") for name in file.keys())  # noqa: SIM118

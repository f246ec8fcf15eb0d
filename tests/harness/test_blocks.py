"""The walk over the blocks: it must be the model's own forward pass, for every family."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from baselines.gptq import GPTQ
from quantease.grid import GridSpec
from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.blocks import (
    InMemoryModel,
    check_coverage,
    decoder_blocks,
    linear_layers,
    other_matrices,
    refuse_left_out,
)
from runners.models.memory import Memory
from runners.models.walk_check import check_walk
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.input_statistics import input_groups
from runners.quantization.measuring import input_statistics
from tests.families import FAMILIES, random_ids, random_model
from tests.quantize import quantize

# Which layers share an input, in the order in which the block uses them.
SHARED = {
    "opt": [{"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}, {"self_attn.out_proj"}, {"fc1"}, {"fc2"}],
    "bloom": [
        {"self_attention.query_key_value"},
        {"self_attention.dense"},
        {"mlp.dense_h_to_4h"},
        {"mlp.dense_4h_to_h"},
    ],
    "falcon-7b": [  # attention and MLP are parallel and see the same layer norm
        {"self_attention.query_key_value", "mlp.dense_h_to_4h"},
        {"self_attention.dense"},
        {"mlp.dense_4h_to_h"},
    ],
    "falcon-40b": [  # parallel too, but each with a norm of its own
        {"self_attention.query_key_value"},
        {"self_attention.dense"},
        {"mlp.dense_h_to_4h"},
        {"mlp.dense_4h_to_h"},
    ],
    "llama": [
        {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
        {"self_attn.o_proj"},
        {"mlp.gate_proj", "mlp.up_proj"},
        {"mlp.down_proj"},
    ],
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}],
}


def outputs_of_blocks(model: Any, ids: Tensor) -> list[Tensor]:
    """What leaves each block in the model's own forward pass."""
    outputs: list[Tensor] = []
    keep: Callable[..., None] = lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    handles = [block.register_forward_hook(keep) for block in decoder_blocks(model)]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_is_the_models_own_forward_pass(family: str) -> None:
    model, ids = random_model(family), random_ids(7)  # 7 = 3 + 3 + 1: the last batch is smaller
    walk = BlockActivations(InMemoryModel(model), ids, batch_size=3)
    expected = [outputs_of_blocks(model, batch) for batch in ids.split(3)]
    for index in range(len(walk.blocks)):
        walk.advance(index)
        for mine, theirs in zip(walk.hidden, expected, strict=True):
            assert torch.equal(mine, theirs[index])


@pytest.mark.parametrize("family", SHARED)
def test_layers_that_share_an_input_are_found(family: str) -> None:
    walk = BlockActivations(InMemoryModel(random_model(family)), random_ids(2), batch_size=2)
    assert [set(group) for group in input_groups(walk, 1)] == SHARED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_statistics_are_those_of_what_enters_each_layer(family: str) -> None:
    model, ids = random_model(family), random_ids(5)
    inputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args: inputs.setdefault(name, []).append(args[0])

    layers = linear_layers(decoder_blocks(model)[0])
    handles = [layer.module.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    walk = BlockActivations(InMemoryModel(model), ids, batch_size=2)
    groups = input_groups(walk, 0)
    assert sorted(name for group in groups for name in group) == sorted(layers)
    measured = input_statistics(walk, 0, groups)
    assert [group for group, _ in measured] == groups
    for group, statistics in measured:
        assert statistics.tokens == statistics.of_tokens == ids.numel()
        for name in group:
            x = inputs[name][0].flatten(0, -2).double()
            torch.testing.assert_close(statistics.hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(statistics.mean_input.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_is_seen_as_out_by_in_however_it_is_stored(family: str) -> None:
    block = decoder_blocks(random_model(family))[0]
    name, layer = next(iter(linear_layers(block).items()))
    x = torch.randn(3, layer.in_features)
    module: Any = layer.module
    bias = module.bias if module.bias is not None else torch.zeros(())
    torch.testing.assert_close(layer.module(x), x @ layer.weight.T + bias)
    layer.replace(torch.ones_like(layer.weight))
    assert block.get_parameter(f"{name}.weight").eq(1).all()


def mixtral(layers: int = 2) -> Any:
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_matrices_outside_linear_layers_are_found_in_every_block() -> None:
    model = mixtral()
    found = other_matrices(decoder_blocks(model)[1])
    assert sorted(found) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"]
    assert check_coverage(random_model("llama")) is None
    for name in found:  # the first block is no example of the others
        module, _, parameter = name.rpartition(".")
        delattr(decoder_blocks(model)[0].get_submodule(module), parameter)
    share = sum(matrix.numel() for name, matrix in found.items() if "gate." not in name)  # routers are meant to stay
    attention = 3072  # 32 x 32 twice, 32 x 16 twice, in each block
    assert check_coverage(model) == (
        f"2 matrices outside linear layers, {share / (share + 2 * attention):.0%} of the weights in the decoder blocks, "
        "stay unquantized and are counted in bits_per_weight at the bits they are stored in (first: "
        "mlp.experts.gate_up_proj (2, 128, 32) in block 1)"
    )
    refuse_left_out(model, "record")
    with pytest.raises(InputError, match=r"2 matrices .* in block 1\); warnings=record goes on and records it$"):
        refuse_left_out(model, "error")


def test_blocks_that_share_a_weight_are_refused() -> None:
    model = random_model("llama")
    first, second = decoder_blocks(model)
    second.get_submodule("mlp").up_proj = first.get_submodule("mlp.up_proj")
    with pytest.raises(InputError, match=r"blocks 0 and 1 of LlamaForCausalLM share the weight mlp\.up_proj\.weight"):
        decoder_blocks(model)


def test_a_model_without_blocks_is_refused() -> None:
    model = random_model("opt")
    model.model.decoder.layers = nn.Sequential(*model.model.decoder.layers)
    with pytest.raises(InputError, match="OPTForCausalLM has no list of decoder blocks"):
        decoder_blocks(model)


def test_a_model_with_two_lists_of_blocks_is_refused() -> None:
    model = random_model("opt")
    model.model.decoder.others = nn.ModuleList([nn.Linear(4, 4) for _ in model.model.decoder.layers])
    with pytest.raises(InputError, match=r"in several lists of modules \(layers, others\), none of which is all"):
        decoder_blocks(model)


def test_experts_and_shorter_lists_are_not_taken_for_blocks() -> None:
    model = random_model("opt")
    decoder = model.model.decoder
    decoder.layers[0].experts = nn.ModuleList([nn.Linear(4, 4) for _ in decoder.layers])
    decoder.projections = nn.ModuleList([nn.Linear(4, 4)])
    assert decoder_blocks(model) is decoder.layers


def test_blocks_are_found_without_a_list_of_their_classes() -> None:
    model = random_model("opt")
    model._no_split_modules = None
    assert decoder_blocks(model) is model.model.decoder.layers


def test_a_layer_that_is_never_used_shares_no_input() -> None:
    model = random_model("opt")
    model.model.decoder.layers[0].spare = nn.Linear(32, 32)
    walk = BlockActivations(InMemoryModel(model), random_ids(2), batch_size=2)
    groups = input_groups(walk, 0)
    assert groups[-1] == ("spare",)  # other sequences might reach it
    assert [group for group, _ in input_statistics(walk, 0, groups)] == groups[:-1]


def test_activations_that_are_not_finite_are_noticed_and_go_no_further() -> None:
    model = random_model("llama")
    model.model.layers[0].mlp.up_proj.weight.fill_(1e38)
    walk = BlockActivations(InMemoryModel(model), random_ids(2), batch_size=2)
    groups = input_groups(walk, 0)
    finite = {group: statistics.finite for group, statistics in input_statistics(walk, 0, groups)}
    assert not finite["mlp.down_proj",]
    assert sum(finite.values()) == len(groups) - 1
    with pytest.raises(InputError, match=r"activations that leave block 0 are not finite: try model\.dtype=bfloat16"):
        walk.advance(0)


def test_arguments_that_depend_on_what_earlier_blocks_make_are_refused() -> None:
    model = random_model("opt")
    decoder = model.model.decoder
    forward = decoder.layers[1].forward
    decoder.layers[1].forward = lambda hidden, *args, extra=None, **kwargs: forward(hidden, *args, **kwargs)
    decoder.layers[1].register_forward_pre_hook(
        lambda _m, args, kwargs: (args, kwargs | {"extra": args[0] if args else kwargs["hidden_states"]}),
        with_kwargs=True,
    )
    with pytest.raises(InputError, match="block 1 receives another extra where the blocks before it run"):
        check_walk(InMemoryModel(model), random_ids(2))


@pytest.mark.parametrize("family", ["opt", "llama", "gemma4"])
def test_activations_in_host_memory_change_nothing(family: str) -> None:
    """Run on a GPU where there is one, with copies ahead of the work; else the bookkeeping alone."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, ids = random_model(family).to(device), random_ids(7)
    near, far = (
        BlockActivations(InMemoryModel(model), ids, 3, memory=Memory(offload=False)),
        BlockActivations(InMemoryModel(model), ids, 3, memory=Memory(offload=True)),
    )
    assert all(batch.device.type == "cpu" for batch in far.hidden)
    for index in range(len(near.blocks)):
        groups = input_groups(near, index)
        assert input_groups(far, index) == groups
        pairs = zip(input_statistics(near, index, groups), input_statistics(far, index, groups), strict=True)
        assert all(torch.equal(a.hessian, b.hessian) for (_, a), (_, b) in pairs)
        near.advance(index)
        far.advance(index)
    for mine, theirs in zip(near.hidden, far.hidden, strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_shared_keys_travel_with_their_batch() -> None:
    """However often a block is run before it advances, and however its batches are divided."""
    model, ids = random_model("gemma4"), random_ids(7)
    whole, divided = BlockActivations(InMemoryModel(model), ids, 3), BlockActivations(InMemoryModel(model), ids, 7)
    for index, size in enumerate([4, 2, 1, 5]):
        for walk in (whole, divided):
            list(walk.run(index))
            walk.sample(index)
        divided.memory.batch_size = size
        whole.advance(index)
        divided.advance(index)
    assert [sorted(shared) for shared in whole.shared] == [["shared_kv_states"]] * 3
    torch.testing.assert_close(divided.hidden[0], torch.cat(whole.hidden))
    expected = torch.cat([model(batch, use_cache=False).logits for batch in ids.split(3)])
    assert torch.equal(torch.cat([whole.logits(hidden) for hidden in whole.hidden]), expected)


def test_a_run_with_shared_keys_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def run(folder: Path) -> dict[str, bytes]:
        finished = FinishedBlocks(folder, {})
        quantize(InMemoryModel(random_model("gemma4")), random_ids(5), 2, GPTQ(), GridSpec(3), finished=finished)
        return {file.name: file.read_bytes() for file in sorted((folder / "checkpoint").glob("*.safetensors"))}

    expected = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed" / "checkpoint" / "block-00003.json").unlink()
    assert len(expected) == 4
    assert run(tmp_path / "killed") == expected

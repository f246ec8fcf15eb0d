"""One loader's rules: every weight and buffer that is read block by block is the one that `from_pretrained` loads."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from runners.errors import InputError
from runners.models.blocks import decoder_blocks
from runners.models.checkpoint import Model, load, open_checkpoint
from runners.models.streaming import StreamedModel, open_model
from tests.families import random_model
from tests.family_zoo import ALL_FAMILIES, NotBuilt, small_model

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
SAMPLE = [  # of each kind: tied, renamed, converted, with buffers that are stored, with modules kept in float32
    "bamba", "bloom", "codegen", "deepseek_v3", "flint", "gemma3_text", "glm4_moe", "gpt2", "mamba2", "mixtral",
    "nemotron_h", "opt", "rwkv",
]  # fmt: skip


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that `state_dict` leaves out."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))


def assert_same(mine: nn.Module, theirs: nn.Module) -> None:
    expected = tensors(theirs)
    assert tensors(mine).keys() == expected.keys()
    for name, tensor in tensors(mine).items():
        if not tensor.is_meta:  # in a block that is closed
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num()), name


def check(folder: Path, dtype: str | None = None) -> Any:
    """Hold the model that is measured to the one that transformers loads; returns the latter."""
    model = Model("random", str(folder), dtype=dtype)
    checkpoint = open_checkpoint(model)
    source = open_model(checkpoint, model, CPU)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto").eval()
    for index, block in enumerate(decoder_blocks(theirs)):
        with source.open_block(index) as mine:
            assert_same(mine, block)
    assert_same(source.model, theirs)
    assert_same(load(checkpoint, model, CPU), theirs)  # what zero-shot tasks are measured on
    return theirs


def check_family(family: str, folder: Path) -> None:
    if family not in ALL_FAMILIES:
        pytest.skip(f"transformers does not know {family}")
    for variant in ("untied", "tied"):
        with suppress(NotBuilt, _Refused):
            small_model(family, variant).save_pretrained(folder / variant)
            _refuse_as_the_table_does(folder / variant)
            for dtype in ("float32", "bfloat16"):
                check(folder / variant, dtype)


class _Refused(Exception):
    """The family is refused whatever its weights are; for which reason is the matter of `test_families.py`."""


def _refuse_as_the_table_does(folder: Path) -> None:
    try:
        open_checkpoint(Model("random", str(folder)))
    except InputError as error:
        raise _Refused from error


@pytest.mark.parametrize("family", SAMPLE)
def test_both_loaders_give_a_sample_of_families_the_same(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in ALL_FAMILIES if family not in SAMPLE])
def test_both_loaders_give_every_family_the_same(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


def tied_llama(folder: Path) -> Any:
    """A Llama with a head of its own, whose config.json ties it to the embedding."""
    model = random_model("llama")
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return model


def test_another_head_beside_the_tie_is_loaded(tmp_path: Path) -> None:
    model = tied_llama(tmp_path)
    theirs = check(tmp_path)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(theirs.lm_head.weight, theirs.model.embed_tokens.weight)


def test_the_same_head_beside_the_tie_is_the_embedding(tmp_path: Path) -> None:
    tied_llama(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    check(tmp_path)
    model = Model("tied", str(tmp_path))
    streamed = open_model(open_checkpoint(model), model, CPU).model
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight


def test_a_tied_embedding_that_only_the_head_holds(tmp_path: Path) -> None:
    tied_llama(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    assert torch.equal(check(tmp_path).model.embed_tokens.weight, weights["lm_head.weight"])


def test_modules_kept_in_float32_are_kept_where_blocks_are_read_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=128, hidden_size=32, attention_hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        context_length=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check(tmp_path, "float16")
    model = Model("kept", str(tmp_path), dtype="float16")
    source = open_model(open_checkpoint(model), model, CPU)
    assert isinstance(source, StreamedModel)
    with source.open_block(0) as block:
        dtypes = {name: parameter.dtype for name, parameter in block.named_parameters()}
    assert dtypes["attention.time_decay"] == dtypes["attention.time_first"] == torch.float32
    assert dtypes["attention.key.weight"] == torch.float16


def test_tensors_that_transformers_ignores_are_ignored(tmp_path: Path) -> None:
    """Layers for the prediction of several tokens, which follow the decoder blocks."""
    small_model("deepseek_v3").save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    weights["model.layers.61.eh_proj.weight"] = torch.ones(4, 4)
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    check(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.other.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_a_weight_without_a_place_is_refused_by_both_loaders(name: str, tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file(weights | {name: torch.ones(32)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = Model("more", str(tmp_path))
    for read in (open_model, load):
        with pytest.raises(InputError, match=f"holds {name}, for which its config.json has no place"):
            read(open_checkpoint(model), model, CPU)


def test_the_bits_of_weights_are_those_of_the_files_where_the_config_is_silent(tmp_path: Path) -> None:
    random_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    assert open_checkpoint(Model("silent", str(tmp_path))).stored_bits == 16
    assert check(tmp_path).dtype == torch.bfloat16

"""Checkpoints that are damaged or made to do harm: a sentence or a correct run, never a wrong number, never their code.

What a wrong number is: one that stands for another input than it names. Neither safetensors nor JSON has a checksum, so a
weight, a word or a digit that has become another valid one cannot be told from what was meant. It is another input then,
and must have another fingerprint; everything that contradicts itself or the files beside it is refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from runners.errors import InputError
from runners.models.checkpoint import Model, check_files, load, load_tokenizer, open_checkpoint
from runners.storage.fingerprint import checkpoint_fingerprint
from tests.hostile import copy_of, damage, examples, header_of, json_values, pack, sentence

CPU = torch.device("cpu")
WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
MATRIX, OTHER = "model.decoder.layers.0.fc2.weight", "model.decoder.layers.1.fc2.weight"


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All that a run reads of a checkpoint."""
    model = Model("hostile", str(folder))
    checkpoint = open_checkpoint(model)
    load_tokenizer(checkpoint)
    return load(checkpoint, model, CPU).state_dict()


def identity(folder: Path) -> str:
    return checkpoint_fingerprint.__wrapped__(folder)


def refuse_or_another(toy: Path, folder: Path) -> None:
    """The rule of this file, for a checkpoint: refused, or loaded whole and finite under an identity of its own."""
    weights = sentence(lambda: read_all(folder))
    if weights is not None:
        assert all(torch.isfinite(weight).all() for weight in weights.values())
        assert identity(folder) != identity(toy)


# safetensors


@examples(40)
@given(data=st.data())
def test_a_damaged_safetensors_header(toy_model: Path, data: st.DataObject) -> None:
    whole = (toy_model / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    damaged = data.draw(damage(whole, within=end))
    with copy_of(toy_model, model__safetensors=damaged) as folder:
        refuse_or_another(toy_model, folder)


@examples(40)
@given(data=st.data())
def test_a_forged_safetensors_header(toy_model: Path, data: st.DataObject) -> None:
    header, content = header_of(toy_model / WEIGHTS)
    entry = header[data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    dtypes = st.sampled_from(["F16", "I32", "U32", "F64", "I8", "BOOL", "F8_E4M3", "f32", "PICKLE"])
    pairs = st.lists(st.integers(-1, 2**64) | st.integers(0, 10**4), min_size=0, max_size=3)
    entry[field] = data.draw(dtypes if field == "dtype" else pairs | json_values())
    with copy_of(toy_model, model__safetensors=pack(header, content)) as folder:
        refuse_or_another(toy_model, folder)


@examples(15)
@given(data=st.data())
def test_a_bit_that_flips_in_the_weights(toy_model: Path, data: st.DataObject) -> None:
    whole = bytearray((toy_model / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    whole[data.draw(st.integers(start, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with copy_of(toy_model, model__safetensors=bytes(whole)) as folder:
        refuse_or_another(toy_model, folder)
        if (weights := sentence(lambda: read_all(folder))) is not None:
            sound = read_all(toy_model)
            assert (
                sum(int((weights[name] != sound[name]).any()) for name in sound) <= 2
            )  # an embedding is also the head


LIES: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "a header of 2^63 bytes": lambda header, data: pack(header, data, 2**63),
    "a header longer than the file": lambda header, data: pack(header, data, 10**9),
    "a header that is no JSON": lambda header, data: pack(b"\x80\x04cos\nsystem\n", data),
    "a header nested deeply": lambda header, data: pack(b"[" * 10**5, data),
    "overlapping tensors": lambda header, data: pack(
        header | {MATRIX: header[MATRIX] | {"data_offsets": [0, 32 * 64 * 4]}}, data
    ),
    "negative offsets": lambda header, data: pack(
        header | {MATRIX: header[MATRIX] | {"data_offsets": [-8192, 0]}}, data
    ),
    "more bytes than tensors": lambda header, data: pack(header, data + b"PK\x03\x04"),
    "a shape that overflows": lambda header, data: pack(
        header | {MATRIX: header[MATRIX] | {"shape": [2**40] * 4}}, data
    ),
    "whole numbers for weights": lambda header, data: pack(header | {MATRIX: header[MATRIX] | {"dtype": "I32"}}, data),
    "a name twice": lambda header, data: pack(
        json.dumps(header).encode()[:-1] + f', "{MATRIX}": {json.dumps(header[OTHER])}}}'.encode(), data
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies(toy_model: Path, lie: str) -> None:
    with (
        copy_of(toy_model, model__safetensors=LIES[lie](*header_of(toy_model / WEIGHTS))) as folder,
        pytest.raises(InputError, match=r"damaged|of type I32"),
    ):
        check_files(folder)


# shards


def shards(folder: Path, names: list[str], weight_map: dict[str, Any] | None = None) -> None:
    """Split the weights over files, and write their index."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    parts = [{name: weights[name] for name in sorted(weights)[place :: len(names)]} for place in range(len(names))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    true = {weight: name for name, part in zip(names, parts, strict=True) for weight in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map or true}))


def test_shards_are_read_whatever_their_names(toy_model: Path) -> None:
    with copy_of(toy_model) as folder:
        shards(folder, ["a.safetensors", "b.safetensors"])
        split = read_all(folder)
    whole = read_all(toy_model)
    assert all(torch.equal(split[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "names",
    [
        ["a.safetensors", "pytorch_model.bin"],
        ["../a.safetensors"],
        [".."],
        [""],
        [3],
        [[]],
        ["a\0.safetensors"],
        ["\ud800.safetensors"],
    ],
)
def test_an_index_names_safetensors_of_its_folder_only(toy_model: Path, names: list[Any]) -> None:
    with copy_of(toy_model) as folder:
        shards(folder, ["a.safetensors", "pytorch_model.bin"], {str(place): name for place, name in enumerate(names)})
        assert sentence(lambda: read_all(folder)) is None


@pytest.mark.parametrize("lost", ["a.safetensors", "b.safetensors"])
def test_an_index_that_forgets_a_shard(toy_model: Path, lost: str) -> None:
    with copy_of(toy_model) as folder:
        shards(folder, ["a.safetensors", "b.safetensors"])
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        kept = {weight: file for weight, file in weight_map.items() if file != lost}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": kept}))
        with pytest.raises(InputError, match="holds no weights for"):
            read_all(folder)


def test_a_weight_in_two_shards(toy_model: Path) -> None:
    with copy_of(toy_model) as folder:
        save_file({MATRIX: torch.zeros(32, 64)}, folder / "b.safetensors", metadata={"format": "pt"})
        (folder / WEIGHTS).rename(folder / "a.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
        with pytest.raises(InputError, match=f"{MATRIX} is in .*a.safetensors and in b.safetensors"):
            check_files(folder)


@examples(40)
@given(index=st.binary(max_size=30) | json_values().map(lambda value: json.dumps(value).encode()))
def test_an_index_of_anything(toy_model: Path, index: bytes) -> None:
    with copy_of(toy_model, model__safetensors=None) as folder:
        for content in (index, b'{"weight_map": ' + index + b"}", b'{"weight_map": {"a": ' + index + b"}}"):
            (folder / INDEX).write_bytes(content)
            assert sentence(lambda: check_files(folder)) is None


# config.json

HOSTILE: dict[str, dict[str, Any]] = {
    "a billion layers": {"num_hidden_layers": 10**9},
    "a billion layers of a family that lists them": {"model_type": "qwen3", "num_hidden_layers": 10**9},
    "a billion labels": {"num_labels": 10**9},
    "a billion experts": {"model_type": "mixtral", "num_local_experts": 10**9},
    "no layers": {"num_hidden_layers": 0},
    "fewer layers than the weights": {"num_hidden_layers": 1},
    "negative width": {"hidden_size": -32},
    "a width that overflows": {"hidden_size": 10**400},
    "a huge vocabulary": {"vocab_size": 10**18},
    "a text for a number": {"num_hidden_layers": "two"},
    "a window of one token": {"model_type": "bloom", "seq_length": 1},
    "whole numbers": {"dtype": "int8"},
    "a type that is none": {"dtype": "Tensor"},
    "double precision": {"dtype": "float64"},
    "weights quantized already": {"quantization_config": {"quant_method": "fp8"}},
    "other weights": {"transformers_weights": "other.safetensors"},
    "another config": {"configuration_files": ["config.4.0.0.json"]},
    "kernels of the hub": {"attn_implementation": "someone/kernels"},
    "an unknown family": {"model_type": "evil"},
    "a function for an activation": {"activation_function": "__import__('os').system"},
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", HOSTILE)
def test_a_config_that_asks_too_much(toy_model: Path, what: str) -> None:
    config = json.loads((toy_model / CONFIG).read_text()) | HOSTILE[what]
    with copy_of(toy_model, config__json=json.dumps(config), other__safetensors=b"") as folder:
        assert sentence(lambda: read_all(folder)) is None


@pytest.mark.timeout(120)
@examples(60)
@given(data=st.data())
def test_a_config_of_anything(toy_model: Path, data: st.DataObject) -> None:
    whole = (toy_model / CONFIG).read_bytes()
    config = json.loads(whole)
    if data.draw(st.booleans()):
        config[data.draw(st.sampled_from(sorted(config)))] = data.draw(json_values())
        content = json.dumps(config).encode("utf-8", "surrogatepass")
    else:
        content = data.draw(damage(whole) | json_values().map(lambda value: json.dumps(value).encode()))
    if content == whole:
        return
    with copy_of(toy_model, config__json=content) as folder:
        refuse_or_another(toy_model, folder)


@pytest.mark.parametrize("where", [CONFIG, "tokenizer_config.json"])
@pytest.mark.parametrize("family", ["opt", "evil"])
def test_no_code_of_a_checkpoint_is_run(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, family: str
) -> None:
    """Not even where somebody says yes to whatever is asked."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    kind = {"model_type": family} if where == CONFIG else {"tokenizer_class": family}
    marker = tmp_path / "executed"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    content = json.loads((toy_model / where).read_text()) | kind | {"auto_map": classes}
    with copy_of(toy_model, evil__py=code, **{where.replace(".", "__"): json.dumps(content)}) as folder:
        sentence(lambda: read_all(folder))
    assert not marker.exists()


def test_an_adapter_does_not_stand_for_its_model(toy_model: Path) -> None:
    adapter = json.dumps({"base_model_name_or_path": str(toy_model), "peft_type": "LORA"})
    with (
        copy_of(toy_model, adapter_config__json=adapter) as folder,
        pytest.raises(InputError, match="adapter for another model"),
    ):
        open_checkpoint(Model("adapter", str(folder)))


# tokenizer


def read_tokenizer(folder: Path) -> Any:
    return load_tokenizer(open_checkpoint(Model("hostile", str(folder))))


@examples(15)
@given(data=st.data())
def test_a_damaged_tokenizer(toy_model: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    damaged = data.draw(damage((toy_model / name).read_bytes(), within=data.draw(st.sampled_from([None, 1500]))))
    with copy_of(toy_model, **{name.replace(".", "__"): damaged}) as folder:
        if sentence(lambda: read_tokenizer(folder)) is not None:
            assert identity(folder) != identity(toy_model)


def test_a_tokenizer_that_aborts_whoever_reads_it(toy_model: Path) -> None:
    """The prefix cuts a letter of two bytes in half, which ends the process that reads it, not only the reading."""
    tokenizer = json.loads((toy_model / "tokenizer.json").read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "x"
    with (
        copy_of(toy_model, tokenizer__json=json.dumps(tokenizer)) as folder,
        pytest.raises(InputError, match=r"tokenizer in .* cannot be loaded"),
    ):
        read_tokenizer(folder)

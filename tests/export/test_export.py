"""`python -m runners.export`: loaded again, an export has the run's perplexity; what cannot be held is refused."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from runners.arguments import invoke
from runners.errors import InputError
from runners.export import __main__ as command
from runners.export.card import CARD, FACTS
from runners.formats.words import pack_words, unpack_words
from runners.models.blocks import decoder_blocks, linear_layers
from runners.models.experts import take_apart
from runners.quantization.finished_blocks import FinishedBlocks
from runners.run.experiment import run_cell
from tests.conftest import ToySettings, missing
from tests.experts.conftest import checkpoint

Export = Callable[..., Path]


@pytest.fixture
def export(toy_settings: ToySettings, toy_model: Path, tmp_path: Path) -> Export:
    """Makes a run of these settings, and writes it in a format."""

    def make(layout: str, *settings: str, words: tuple[str, ...] = ()) -> Path:
        run = toy_settings("device=cpu", *settings)
        assert run_cell(run)["status"] == "done"
        place = next((word[11:] for word in settings if word.startswith("model.path=")), toy_model)
        to = tmp_path / layout
        invoke([str(run.folder), f"format={layout}", f"to={to}", f"model={place}", "device=cpu", *words], command.main)
        return to

    return make


def facts(folder: Path) -> dict:
    return json.loads((folder / FACTS).read_text())


def test_words_hold_codes_of_any_size() -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in range(1, 9):
        for shape in ((3, 5), (2, 64), (4, 33), (1, 1)):
            codes = torch.randint(0, 2**bits, shape, generator=generator)
            assert torch.equal(unpack_words(pack_words(codes, bits), bits, shape[1]).long(), codes)


HELD = [
    ("dense", "method=awq"),
    ("dense", "method=quantease_outlier"),
    ("gptq", "method=gptq", "bits=3", "group_size=32"),
    ("gptq", "method=rtn", "bits=2", "group_size=16", "act_order=true"),
    ("compressed_tensors", "method=gptq", "bits=3"),
    ("compressed_tensors", "method=rtn", "bits=5", "group_size=32", "symmetric=true"),
    (
        "compressed_tensors",
        "method=rtn",
        "layers=[{match: '*.fc2', bits: 4, group_size: 16}, {match: '0.*', skip: true}]",
    ),
]
HELD_TOO = [
    ("dense", "method=rtn"),
    ("dense", "method=spqr"),
    ("dense", "method=gptq", "grid=mxfp4"),
    ("gptq", "method=gptq", "bits=4"),
    ("gptq", "method=rtn", "bits=8", "symmetric=true"),
    ("compressed_tensors", "method=quantease", "bits=2", "group_size=16"),
    ("compressed_tensors", "method=rtn", "bits=7", "scale_bits=32"),
    ("compressed_tensors", "method=rtn", "bits=8", "act_order=true"),
]
CASES = [*HELD, *(pytest.param(words, marks=pytest.mark.slow) for words in HELD_TOO)]


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_what_is_written_has_the_runs_perplexity(export: Export, words: tuple[str, ...]) -> None:
    folder = export(*words)
    check = facts(folder)["check"]
    assert check["after"] == check["before"]
    assert "is the run's" in (folder / CARD).read_text()
    assert (folder / "tokenizer.json").is_file()
    assert not list(folder.parent.glob("*.partial"))


@pytest.mark.parametrize("words", [("gptq", "bits=3", "group_size=16"), ("compressed_tensors", "bits=4")], ids=" ".join)
def test_column_scales_are_folded(export: Export, words: tuple[str, ...]) -> None:
    folder = export(*words, "method=awq")
    check = facts(folder)["check"]
    assert math.isclose(check["after"], check["before"], rel_tol=1e-4)
    assert "self_attn.out_proj into self_attn.v_proj" in facts(folder)["folded"]
    assert "- of fc2 into fc1\n" in (folder / CARD).read_text()


def test_column_scales_that_nothing_can_take_are_refused(toy_model: Path, export: Export, tmp_path: Path) -> None:
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    with pytest.raises(
        InputError, match=r"cannot hold this run: .*layers\.0\.fc2 has .* before it .*: format=dense can"
    ):
        export("gptq", "method=awq", f"model.path={model}")


@pytest.mark.parametrize(
    ("layout", "settings", "sentence"),
    [
        ("gptq", ("method=rtn", "bits=5"), "has 5 bits, the format has 2, 3, 4 or 8: format=compressed_tensors or"),
        ("gptq", ("method=rtn", "scale_bits=32"), "are not those of float16: format=compressed_tensors or"),
        (
            "gptq",
            ("method=rtn", "layers=[{match: '*.fc2', bits: 4}]"),
            "are of 2 kinds of grids, the format has one",
        ),
        (
            "gptq",
            ("method=rtn", "layers=[{match: '0.fc2', skip: true}]"),
            "fc2 is not quantized, and the format quantizes",
        ),
        ("gptq", ("method=spqr",), "format=dense can hold it"),
        ("compressed_tensors", ("method=spqr",), "format=dense can hold it"),
        (
            "compressed_tensors",
            ("method=rtn", "grid=nf4", "group_size=32"),
            "levels that are looked up, and the format.s is int",
        ),
        ("compressed_tensors", ("method=quantease_outlier",), "outliers in high precision: format=dense can hold it"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    export: Export, tmp_path: Path, layout: str, settings: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(InputError, match=f"format={layout} cannot hold this run: .*{sentence}"):
        export(layout, *settings)
    assert not list(tmp_path.glob(f"{layout}*"))


def test_the_dense_weights_are_those_that_were_measured(toy_settings: ToySettings, export: Export) -> None:
    folder = export("dense", "method=gptq")
    blocks = FinishedBlocks(toy_settings("method=gptq").folder, {})
    model = AutoModelForCausalLM.from_pretrained(folder)
    for index, block in enumerate(decoder_blocks(model)):
        layers = linear_layers(block)
        for name, layer in blocks.layers(index, "cpu").items():
            assert torch.equal(layers[name].weight, layer.weight.to(layers[name].weight.dtype)), name


def test_transformers_reads_compressed_tensors(export: Export) -> None:
    pytest.importorskip("compressed_tensors", reason=missing("compressed-tensors"))
    folder = export("compressed_tensors", "method=gptq", "bits=3", "group_size=32")
    assert facts(folder)["check"]["reader"] == "transformers"


def test_nothing_is_overwritten(export: Export, tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    with pytest.raises(InputError, match="exists: name a folder that does not"):
        export("dense", "method=rtn")


def test_an_export_that_was_not_checked_says_so(export: Export) -> None:
    folder = export("dense", "method=rtn", words=("check=false",))
    assert facts(folder)["check"] is None
    assert "It was not loaded again" in (folder / CARD).read_text()


def test_a_text_that_was_not_measured_cannot_be_compared(export: Export) -> None:
    with pytest.raises(InputError, match="the run was not evaluated on a text ptb"):
        export("dense", "method=rtn", words=("text=ptb",))


def test_the_codes_are_those_of_the_run(toy_settings: ToySettings, export: Export) -> None:
    folder = export("gptq", "method=gptq", "bits=4", "group_size=32")
    blocks = FinishedBlocks(toy_settings("method=gptq", "bits=4", "group_size=32").folder, {})
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for number in range(2):
        for name, layer in blocks.layers(number, "cpu").items():
            full = next(key for key in index if key.endswith(f"layers.{number}.{name}.qweight"))
            words = load_file(folder / index[full])[full]
            assert torch.equal(unpack_words(words.T, 4, layer.codes.shape[1]), layer.codes)


def test_what_others_have_written_is_not_copied(export: Export, toy_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    (model / "README.md").write_text("theirs")
    (model / "LICENSE").write_text("a license")
    folder = export("dense", "method=rtn", f"model.path={model}")
    assert "QuantEase Bench" in (folder / CARD).read_text()
    assert (folder / "LICENSE").read_text() == "a license"


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
@torch.no_grad()
def test_experts_are_written_dense(export: Export, toy_settings: ToySettings, tmp_path: Path, family: str) -> None:
    model = checkpoint(family, tmp_path / "model")
    settings = ("method=rtn", "bits=4", f"model.path={model}", "model.sequence_length=32")
    folder = export("dense", *settings)
    assert facts(folder)["check"]["after"] == facts(folder)["check"]["before"]
    blocks = FinishedBlocks(toy_settings("device=cpu", *settings).folder, {})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    take_apart(loaded)
    for index, block in enumerate(decoder_blocks(loaded)):
        layers, quantized = linear_layers(block), blocks.layers(index, "cpu")
        assert any(".experts." in name for name in quantized)
        for name, layer in quantized.items():
            assert torch.equal(layers[name].weight, layer.weight.to(layers[name].weight.dtype)), name
    with pytest.raises(InputError, match=r"are not the model's weights one by one .* format=dense can hold them"):
        export("gptq", *settings)

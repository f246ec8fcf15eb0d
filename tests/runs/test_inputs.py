"""Bad input: a sentence within seconds, before calibration, and nothing lost."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from runners.errors import InputError
from runners.models.checkpoint import Model, check_files, open_checkpoint
from runners.results.metrics import METRICS
from runners.results.run_folder import RunFolder
from runners.run.experiment import run_cell
from runners.storage.files import check_writable, write
from tests.conftest import ToySettings, write_rows


def fails(toy_settings: ToySettings, *overrides: str) -> dict[str, str]:
    """The row of a run that must fail before anything is calibrated."""
    row = run_cell(toy_settings("method=gptq", *overrides))
    assert row["status"] == "failed"
    assert row["stage"] in ("preflight", "load")
    assert "\n" not in row["error"]
    return row


def test_a_folder_that_is_not_there(toy_settings: ToySettings, tmp_path: Path) -> None:
    row = fails(toy_settings, f"model.path={tmp_path / 'nothing'}")
    assert row["error"].startswith(f"there is no folder {tmp_path / 'nothing'}")


def test_a_folder_without_config(toy_settings: ToySettings, model_copy: Path) -> None:
    (model_copy / "config.json").unlink()
    assert "holds no config.json" in fails(toy_settings, f"model.path={model_copy}")["error"]


def test_a_folder_without_weights(toy_settings: ToySettings, model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    assert "holds no weights" in fails(toy_settings, f"model.path={model_copy}")["error"]


def test_pickled_weights_only(toy_settings: ToySettings, model_copy: Path) -> None:
    (model_copy / "model.safetensors").unlink()
    (model_copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    error = fails(toy_settings, f"model.path={model_copy}")["error"]
    assert "are pickled, and unpickling runs code: convert them to safetensors" in error


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000])
def test_a_truncated_safetensors_file(toy_settings: ToySettings, model_copy: Path, kept: int) -> None:
    file = model_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    error = fails(toy_settings, f"model.path={model_copy}")["error"]
    assert error.startswith(f"{file} is missing, truncated or damaged")


def test_a_missing_shard(model_copy: Path) -> None:
    (model_copy / "model.safetensors").rename(model_copy / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model_copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is missing"):
        check_files(model_copy)


@pytest.mark.parametrize("index", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../outside.safetensors"}}'])
def test_a_damaged_index(model_copy: Path, index: str) -> None:
    (model_copy / "model.safetensors").unlink()
    (model_copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"is damaged|outside its folder"):
        check_files(model_copy)


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": "no-such-model"}', '{"model_type": "t5"}'])
def test_a_config_that_describes_no_decoder(model_copy: Path, config: str) -> None:
    (model_copy / "config.json").write_text(config)
    with pytest.raises(InputError):
        open_checkpoint(Model("damaged", str(model_copy)))


def test_nan_in_a_weight(toy_settings: ToySettings, model_copy: Path) -> None:
    weights = load_file(model_copy / "model.safetensors")
    weights["model.decoder.layers.0.fc2.weight"][0, 0] = torch.nan
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    error = fails(toy_settings, f"model.path={model_copy}")["error"]
    assert "model.decoder.layers.0.fc2.weight" in error
    assert "NaN or infinity" in error


def test_a_missing_weight(toy_settings: ToySettings, model_copy: Path) -> None:
    weights = load_file(model_copy / "model.safetensors")
    del weights["model.decoder.layers.0.fc2.weight"]
    save_file(weights, model_copy / "model.safetensors", metadata={"format": "pt"})
    assert (
        "no weights for model.decoder.layers.0.fc2.weight" in fails(toy_settings, f"model.path={model_copy}")["error"]
    )


def test_a_weight_of_another_shape(toy_settings: ToySettings, model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"ffn_dim": 96}))
    assert "do not fit its config.json" in fails(toy_settings, f"model.path={model_copy}")["error"]


def test_a_tokenizer_that_is_missing_or_of_another_model(toy_settings: ToySettings, model_copy: Path) -> None:
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert "they do not belong together" in fails(toy_settings, f"model.path={model_copy}")["error"]
    (model_copy / "tokenizer.json").write_text("{}")
    assert "tokenizer in" in fails(toy_settings, f"model.path={model_copy}", "force=true")["error"]


def test_a_group_size_that_does_not_divide_names_the_layer(toy_settings: ToySettings) -> None:
    error = fails(toy_settings, "group_size=64")["error"]
    assert error.startswith("group_size=64 does not divide the 32 inputs of self_attn.")
    assert "in block 0" in error


def test_experts_are_quantized_and_their_router_is_not(toy_settings: ToySettings, model_copy: Path) -> None:
    config = MixtralConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(model_copy, save_original_format=False)
    asked = ("method=rtn", f"model.path={model_copy}")
    row = run_cell(toy_settings(*asked))
    assert (row["warnings/left_alone"], row["layers/count"]) == (1, 4 + 4 * 3 + 1)
    assert 3 < row["bits_per_weight"] < 4
    assert "mlp.experts.3.gate_proj" in (Path(row["folder"]) / "layers.csv").read_text()
    strict = run_cell(toy_settings(*asked, "warnings=error"))  # a router is meant to stay
    assert strict["status"] == "done"


def test_a_text_shorter_than_one_window(toy_settings: ToySettings, tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "wikitext2" / "test.jsonl", [{"text": "Too short."}])
    error = fails(toy_settings, f"data_root={tmp_path / 'data'}")["error"]
    assert "the text wikitext2 has" in error
    assert "fewer than one window of 64" in error


def test_a_calibration_longer_than_its_text(toy_settings: ToySettings) -> None:
    error = fails(toy_settings, "calibration=wikitext2", "calibration.num_sequences=1000")["error"]
    assert "calibration=wikitext2 has" in error
    assert "fewer than the 1000 sequences of 64" in error


def test_calibration_documents_that_are_all_too_short(
    toy_settings: ToySettings, tmp_path: Path, data_root: Path
) -> None:
    root = tmp_path / "data"
    write_rows(root / "c4" / "train.jsonl", [{"text": "Too short."}] * 5)
    (root / "wikitext2").symlink_to(data_root / "wikitext2")
    error = fails(toy_settings, f"data_root={root}")["error"]
    assert "no document of calibration=c4 is longer than a sequence of 64 tokens" in error


@pytest.mark.parametrize("line", ["not json", '"text"', '{"other": 1}', '{"text": 3}', "[]", "\udcff"])
def test_a_broken_line_of_a_data_set(toy_settings: ToySettings, tmp_path: Path, line: str) -> None:
    file = tmp_path / "data" / "wikitext2" / "test.jsonl"
    write_rows(file, [{"text": "fine"}])
    with file.open("ab") as opened:
        opened.write(line.encode("utf-8", "surrogateescape") + b"\n")
    error = fails(toy_settings, f"data_root={tmp_path / 'data'}")["error"]
    what = "a JSON object with a text in 'text'"
    if line == "\udcff":
        what = "UTF-8: convert it, for example with iconv -t UTF-8"
    assert error == f"line 2 of {file} is not {what}"


def test_a_data_set_that_the_data_root_lacks(toy_settings: ToySettings, data_root: Path) -> None:
    (data_root / "c4" / "validation.jsonl").rename(data_root / "c4" / "moved")
    try:
        error = fails(toy_settings, "evaluation=c4")["error"]
    finally:
        (data_root / "c4" / "moved").rename(data_root / "c4" / "validation.jsonl")
    assert "the data set c4 (allenai/c4, validation) is not in the data root" in error
    assert "take it from the hub" in error


def test_results_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"nothing can be written to .*: set results=FOLDER"):
        check_writable(tmp_path / "file" / "results")


def test_damaged_metrics_are_not_taken_for_a_result(tmp_path: Path) -> None:
    for content in ("", "{", "[]", '{"no": "status"}'):
        (tmp_path / METRICS).write_text(content)
        with pytest.raises(InputError, match=r"is damaged .*: restore it, .* force=true"):
            RunFolder(tmp_path).metrics()


@contextmanager
def full_disk() -> Iterator[None]:
    """Writes beyond a few bytes fail, as on a disk that is full: the kernel refuses them, pytest's own output too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text("as it was")
    message = r"metrics\.json cannot be written \(File too large\): make room in "
    with pytest.raises(InputError, match=message), full_disk():
        write(file, "x" * 100_000)
    assert file.read_text() == "as it was"
    assert os.listdir(tmp_path) == [METRICS]


def test_a_disk_that_fills_up_during_a_run(toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last files do not fit: the run is not taken for a finished one, and runs again when there is room."""
    settings = toy_settings("method=rtn")

    def no_room(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: no_room(fd) if (settings.folder / "layers.csv").exists() else fsync(fd))
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        run_cell(settings)
    assert not (settings.folder / METRICS).exists()
    assert not list(settings.folder.glob("*.partial"))
    monkeypatch.undo()
    assert run_cell(settings)["status"] == "done"


def test_force_with_a_file_that_is_gone_keeps_the_result_that_stands(
    toy_settings: ToySettings, model_copy: Path
) -> None:
    words = ["method=rtn", f"model.path={model_copy}"]
    done = run_cell(toy_settings(*words))
    assert done["status"] == "done"
    (model_copy / "tokenizer.json").unlink()
    again = toy_settings(*words, "force=true")
    assert str(again.folder) == done["folder"]
    with pytest.raises(InputError, match="tokenizer"):
        run_cell(again)
    metrics = RunFolder(again.folder).metrics()
    assert metrics is not None
    assert metrics["status"] == "done"

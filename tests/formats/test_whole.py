"""The whole model of a stored checkpoint, as zero-shot tasks need it, and GGUF files measured by their own types."""

import json
from pathlib import Path

import pytest
import torch

from runners.gguf_files.contents import GgufFile
from runners.models.checkpoint import Model, load, open_checkpoint
from runners.models.streaming import open_model
from runners.results import metrics
from runners.results.tables import results_table
from runners.run.experiment import run_cell, run_experiment
from tests.conftest import ToySettings
from tests.formats.test_stored import BLOCKS, quantized
from tests.formats.writers import write_packed
from tests.models.test_gguf import write_gguf

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_model_is_the_one_that_is_read_block_by_block(
    toy_settings: ToySettings, toy_model: Path, tmp_path: Path, dtype: str
) -> None:
    ours = quantized(toy_settings, "bits=4", "group_size=16", "symmetric=true")
    write_packed(toy_model, Path(ours["folder"]), tmp_path / "packed", "gptq v1", BLOCKS)
    model = Model("packed", str(tmp_path / "packed"), dtype=dtype)
    checkpoint = open_checkpoint(model, stored=True)
    whole = dict(load(checkpoint, model, CPU).named_parameters())
    source = open_model(checkpoint, model, CPU)
    seen = 0
    for index in range(len(source.blocks)):
        with source.open_block(index) as block:
            for name, parameter in block.named_parameters():
                assert torch.equal(parameter, whole[f"{BLOCKS}{index}.{name}"]), name
                seen += 1
    assert seen == 2 * 16
    assert {parameter.dtype for parameter in whole.values()} == {getattr(torch, dtype)}


def test_zero_shot_accuracies_are_those_of_the_run_that_made_the_codes(
    toy_settings: ToySettings, toy_model: Path, tmp_path: Path
) -> None:
    tasks = ("evaluation.tasks=[stdlib_last_word]", "evaluation.limit=6")
    ours = quantized(toy_settings, "bits=4", "symmetric=true", *tasks)
    write_packed(toy_model, Path(ours["folder"]), tmp_path / "packed", "gptq v1", BLOCKS)
    theirs = run_cell(toy_settings("method=stored", f"model.path={tmp_path / 'packed'}", *tasks))
    kept = {key: value for key, value in ours.items() if metrics.zero_shot_parts(key)}
    assert kept
    assert {key: value for key, value in theirs.items() if metrics.zero_shot_parts(key)} == kept


def test_the_row_is_beside_the_others_and_marked(toy_settings: ToySettings, toy_model: Path, tmp_path: Path) -> None:
    ours = quantized(toy_settings, "bits=4", "symmetric=true")
    write_packed(toy_model, Path(ours["folder"]), tmp_path / "packed", "gptq v1", BLOCKS)
    settings = toy_settings(
        "method=stored", f"model.path={tmp_path / 'packed'}", f"model.name={toy_model.name}", f"reference={toy_model}"
    )
    reference, theirs = run_experiment(settings)
    assert reference["method"] == metrics.REFERENCE
    assert metrics.model_words([reference, theirs, ours]) == [toy_model.name] * 3
    table, facts = results_table([reference, ours, theirs]).renderables
    assert [str(cell) for cell in table.columns[0].cells] == ["fp32", "gptq", "gptq (elsewhere)"]  # pyright: ignore
    assert "was quantized elsewhere and measured as it is stored, gptq v1" in str(facts)
    assert "path" not in json.dumps(json.loads((settings.folder / metrics.METRICS).read_text())).replace(
        "model_path", ""
    )
    again = run_cell(settings)
    assert again["skipped"] is True


def test_a_reference_of_another_architecture_is_none(
    toy_settings: ToySettings, toy_model: Path, tmp_path: Path
) -> None:
    ours = quantized(toy_settings, "bits=4", "symmetric=true")
    write_packed(toy_model, Path(ours["folder"]), tmp_path / "packed", "gptq v1", BLOCKS)
    bundled = Path(__file__).parents[2] / "runners" / "tiny"
    row = run_cell(toy_settings("method=stored", f"model.path={tmp_path / 'packed'}", f"reference={bundled}"))
    assert row["status"] == "failed"
    assert "it is not its original" in row["error"]


def test_a_gguf_file_is_measured_by_its_types(toy_settings: ToySettings, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q4_1")
    where = (f"model.path={tmp_path / 'm.gguf'}", "model.sequence_length=16")
    plain, stored = (run_cell(toy_settings(f"method={method}", *where)) for method in ("fp16", "stored"))
    assert stored["status"] == "done"
    assert stored[metrics.ppl("wikitext2")] == plain[metrics.ppl("wikitext2")]
    assert (stored["bits"], stored["group_size"]) == (4, 32)
    # 32 codes of 4 bits, and two float16 in 20 bytes: 5 bits a weight; all matrices of the block are of that type.
    assert stored[metrics.BITS_PER_WEIGHT] == 5.0
    assert plain[metrics.BITS_PER_WEIGHT] == 16
    assert metrics.method_words(stored) == "gguf (elsewhere)"
    assert "Q4_1" in stored[metrics.STORED_LAYOUT]
    assert metrics.MODEL_NOTE in plain
    assert metrics.MODEL_NOTE not in stored
    tensors = GgufFile(tmp_path / "m.gguf").tensors
    size = 8 * sum(int(tensor.n_bytes) for tensor in tensors)
    assert stored[metrics.BITS_PER_PARAMETER] == size / sum(int(tensor.n_elements) for tensor in tensors)

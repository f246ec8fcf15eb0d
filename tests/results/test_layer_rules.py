"""Layers of unlike treatment: each is solved, stored, counted and shown on its own grid."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from analysis.collect import collect
from analysis.series import summarize
from analysis.tables.comparison import comparison, markdown
from baselines.gptq import GPTQ
from quantease.grid import GridSpec
from quantease.grids.nf4 import NF4
from quantease.layer import LayerProblem
from runners.config.command_line import check
from runners.config.layer_rules import FORMAT_BITS, GROUPS
from runners.config.settings import Settings
from runners.errors import InputError
from runners.models.blocks import InMemoryModel, decoder_blocks, linear_layers, replace_weights
from runners.models.checkpoint import load
from runners.project import CONF
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.packing import packed_bytes
from runners.results.metrics import CHECKPOINT_SHA256, Status
from runners.results.tables import results_table
from runners.run.disk import codes_bytes
from runners.run.experiment import run_cell
from runners.run.input_check import input_problems
from runners.run.preflight import preflight
from runners.sweeps.cells import describe_cells
from tests.conftest import ToySettings

RULES = (
    'layers=[{match: "0.fc1", skip: true}, {match: "*.fc2", bits: 4, group_size: 16}, '
    '{match: "*.q_proj", grid: nf4, group_size: 32}]'
)
WORDS = "0.fc1 skipped; *.fc2 4 bits group 16; *.q_proj nf4 4 bits group 32; others 3 bits per-channel"
SPECS = {
    "self_attn.q_proj": GridSpec(4, 32, format=NF4()),
    "self_attn.k_proj": GridSpec(3),
    "self_attn.v_proj": GridSpec(3),
    "fc2": GridSpec(4, 16),
}


def kept(settings: Settings) -> FinishedBlocks:
    blocks = FinishedBlocks(settings.folder, {})
    blocks.manifests = [None, None]  # pyright: ignore[reportAttributeAccessIssue] - two blocks, as they are on disk
    return blocks


def test_each_layer_is_solved_on_its_own_grid_and_the_models_own_pass_confirms_it(
    toy_settings: ToySettings, toy_model: Path
) -> None:
    settings = toy_settings("method=gptq", RULES, "keep_checkpoint=always", "device=cpu", "batch_size=3")
    row = run_cell(settings)
    assert row["status"] == Status.DONE
    blocks = kept(settings)

    inputs = preflight(settings)
    source = InMemoryModel(load(inputs.checkpoint, settings.run.model, inputs.device))
    sequences = inputs.sequences
    assert sequences is not None
    with torch.no_grad(), source.open_block(0) as block:
        activations = CalibrationActivations(source, sequences.used, 3, sequences.held_out)
        measured = {
            name: found for group, found in activations.statistics(activations.input_groups()) for name in group
        }
        first = blocks.layers(0, "cpu")
        assert "fc1" not in first
        for name, spec in SPECS.items():
            problem = LayerProblem(linear_layers(block)[name].weight.float(), measured[name].hessian)
            expected = GPTQ().solve(problem, spec)
            assert first[name].grid.spec == spec
            assert torch.equal(first[name].codes, expected.codes), name
            assert torch.equal(first[name].weight, expected.weight)

    model: Any = AutoModelForCausalLM.from_pretrained(toy_model, dtype=torch.float32)
    with torch.no_grad():
        for index, block in enumerate(decoder_blocks(model)):
            replace_weights(block, blocks.layers(index, "cpu"))
        ids = inputs.windows["wikitext2"].ids
        losses = torch.stack([model(window[None], labels=window[None]).loss for window in ids])
    assert row["ppl/wikitext2"] == pytest.approx(losses.double().mean().exp().item(), rel=1e-5)


def test_rows_and_tables_say_what_each_layer_got(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", RULES)
    plain = toy_settings("method=rtn")
    rows = [run_cell(each) for each in (settings, plain, settings.reference())]
    with (settings.folder / "layers.csv").open() as opened:
        layers = {(int(each["block"]), each["layer"]): each for each in csv.DictReader(opened)}
    grid = ("bits", "group_size", "grid", "symmetric")
    assert [layers[1, "fc2"][name] for name in grid] == ["4", "16", "int", "False"]
    assert [layers[0, "self_attn.q_proj"][name] for name in grid] == ["4", "32", "nf4", "False"]
    assert [layers[1, "fc1"][name] for name in grid] == ["3", "", "int", "False"]
    assert [layers[0, "fc1"][name] for name in (*grid, "left_alone", "notes")] == [
        *[""] * 4,
        "True",
        "skipped, as layers asks for",
    ]
    # Of 32 x 32: two at 4 bits (q) and six at 3; of 32 x 64: two at 4 bits (fc2), one at 3, one skipped.
    assert rows[0]["bits"] == (2 * 4 + 6 * 3 + 2 * (2 * 4 + 3)) / (8 + 2 * 3)
    assert (rows[0]["layers"], "layers" in rows[1]) == (WORDS, False)
    assert settings.run_name.startswith("rtn-3b-mixed-")
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(results_table([row | {"setting": ""} for row in rows]))
    assert "3.43 mixed" in console.export_text()
    (described,) = describe_cells([toy_settings("method=gptq", RULES)])
    assert described["layers"] == WORDS
    table = comparison(collect(settings.study_folder))
    assert sorted(table["bits"]) == ["", "3", "3.43"]
    assert f"per-channel mixed ({WORDS})" in list(table["grid"])
    assert "\\*.fc2 4 bits" in markdown(table)
    assert {row["bits"] for row in summarize(collect(settings.study_folder))} == {None, 3, rows[0]["bits"]}


def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("method=gptq", RULES, "calibration.num_sequences=4")
    settings = toy_settings(*words)
    save = FinishedBlocks.save

    def once(self: FinishedBlocks, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    with monkeypatch.context() as killed:
        killed.setattr(FinishedBlocks, "save", once)
        with pytest.raises(KeyboardInterrupt):
            run_cell(settings)
    resumed, fresh = run_cell(settings), run_cell(toy_settings(*words, f"results={tmp_path / 'fresh'}"))
    for key in (CHECKPOINT_SHA256, "bits", "bits_per_weight", "ppl/wikitext2"):
        assert resumed[key] == fresh[key]


def test_the_size_of_the_codes_is_foretold(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=rtn", RULES, "keep_checkpoint=always")
    skeleton = preflight(settings).checkpoint.skeleton
    run_cell(settings)
    blocks = kept(settings)
    sizes = [packed_bytes(layer) for index in range(2) for layer in blocks.layers(index, "cpu").values()]
    assert codes_bytes(skeleton, settings, 0.0) == sum(sizes)


def test_what_a_method_cannot_do_names_the_layer(toy_settings: ToySettings) -> None:
    row = run_cell(toy_settings("method=spqr", 'layers=[{match: "1.fc2", grid: nf4}]', "calibration.num_sequences=4"))
    assert row["status"] == Status.UNSUPPORTED
    assert row["error"].startswith("fc2 in block 1: ")


def test_the_digest_has_what_the_entries_come_to(toy_settings: ToySettings) -> None:
    plain, empty = toy_settings("method=gptq"), toy_settings("method=gptq", "layers=[]")
    assert plain.digest == empty.digest
    assert "layers" not in plain.identity()
    mixed = toy_settings("method=gptq", 'layers=[{match: "*.fc2", bits: 4}]')
    same = 'layers=[{match: "*.fc2", bits: 4, symmetric: false, grid: int, group_size: null}]'
    spelled = toy_settings("method=gptq", same)
    assert mixed.digest == spelled.digest != plain.digest
    assert mixed.quantization != plain.quantization
    assert mixed.reference().digest == plain.reference().digest


def test_a_grid_of_levels_has_the_groups_of_its_conf_file() -> None:
    found = {name: yaml.safe_load((CONF / "grid" / f"{name}.yaml").read_text()) for name in GROUPS}
    assert {name: node["group_size"] for name, node in found.items()} == GROUPS
    assert {node["bits"] for node in found.values()} == {FORMAT_BITS}


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ("{match: '*.fc2', bit: 4}", r"there is no setting layers\[0\]\.bit: did you mean bits"),
        ("{bits: 4}", r"match is missing"),
        ("{match: '*.fc2'}", r"match=\*\.fc2 changes nothing: add bits"),
        ("{match: '*.fc2', bits: 9}", r"layers\[0\], match=\*\.fc2: bits must lie in 2 to 8, not 9"),
        ("{match: '*.fc2', grid: nf4, bits: 3}", r"layers\[0\], match=\*\.fc2: grid=nf4 has codes of 4 bits"),
        ("{match: '*.fc2', grid: nf8}", r"grid must be one of int, nf4, mxfp4, nvfp4, not nf8"),
        ("{match: '*.fc2', skip: true, bits: 3}", r"so bits says nothing"),
        ("{match: '*.fc2', group_size: all}", r"group_size must be a number of columns or null, not 'all'"),
    ],
)
def test_a_wrong_entry_is_refused_when_it_is_read(rules: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check([f"layers=[{rules}]", "method=gptq"], multirun=False)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        ("{match: '*.fc3', bits: 4}", r"match=\*\.fc3, matches no layer: .* 0\.self_attn\.k_proj, .*, \.\.\., 1\.fc2"),
        ("{match: '*.fc2', group_size: 24}", r"group_size=24 does not divide the 64 inputs of fc2 in block 0"),
        ("{match: '*.fc2', bits: 3}", r"layers\[0\], match=\*\.fc2, changes nothing: without it 0\.fc2 and the others"),
        (
            "{match: '*', bits: 4}, {match: '0.*', bits: 2}",
            r"layers\[1\], match=0\.\*, changes nothing: the first match",
        ),
        ("{match: '*', skip: true}", r"layers skips all 12 layers"),
    ],
)
def test_entries_that_do_not_fit_the_model_are_refused_before_anything_is_run(
    toy_settings: ToySettings, rules: str, sentence: str
) -> None:
    settings = toy_settings("method=gptq", f"layers=[{rules}]")
    (problem,) = input_problems(settings, is_run_here=True)
    with pytest.raises(InputError, match=sentence):
        raise InputError(problem)
    with pytest.raises(InputError, match=sentence):
        preflight(settings)


def test_an_entry_may_keep_layers_from_a_later_one(toy_settings: ToySettings) -> None:
    settings = toy_settings("method=gptq", "layers=[{match: 0.fc2, bits: 3}, {match: '*.fc2', bits: 4}]")
    assert not input_problems(settings, is_run_here=True)
    assert [settings.run.spec_of(f"{index}.fc2") for index in range(2)] == [GridSpec(3), GridSpec(4)]

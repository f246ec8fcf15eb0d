"""`python -m runners.audit RUN`: what it writes, what it refuses, and what an interrupt leaves."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from runners.arguments import invoke
from runners.audit.__main__ import main
from runners.audit.walks import Walks
from runners.config.stored import located as with_place
from runners.config.stored import stored_settings
from runners.console import console
from runners.errors import InputError
from runners.kept.run import open_run
from runners.kept.windows import first_windows
from runners.models.blocks import InMemoryModel, linear_layers
from runners.project import ROOT
from runners.quantization.finished_blocks import FinishedBlocks
from runners.results.metrics import METRICS, read
from runners.results.run_folder import RunFolder
from tests.audit.conftest import MakeRun


def audit(run: Path, *settings: str) -> list[dict[str, str]]:
    """The rows that the command writes."""
    invoke([str(run), "device=cpu", *settings], main)
    to = next((Path(word[3:]) for word in settings if word.startswith("to=")), run / "audit.csv")
    with to.open() as opened:
        return list(csv.DictReader(opened))


@pytest.fixture
def located(sharp_model: Path) -> str:
    return f"model={sharp_model}"


def test_the_table_and_what_it_says(run_copy: Path, located: str) -> None:
    with console.capture() as shown:
        rows = audit(run_copy, located, "restore=true", "by=layer,block", "windows=2")
    unquantized, whole, *units = rows
    assert [(row["block"], row["layer"]) for row in (unquantized, whole)] == [("", "none"), ("", "all")]
    assert len(units) == 2 * (6 + 1)
    assert float(unquantized["kl"]) == 0 < float(whole["kl"])
    assert float(whole["kl_restored"]) == 0
    with (run_copy / "layers.csv").open() as opened:
        records = {(row["block"], row["layer"]): row for row in csv.DictReader(opened)}
    for row in units:
        assert float(row["kl"]) > 0
        assert 0 < float(row["share_top_percent"]) <= 1
        for name in ("relative_error", "held_out_error", "token_error", "energy_top_percent", "energy_position"):
            assert row[name] == ("" if row["layer"] == "all" else records[row["block"], row["layer"]][name])
    assert {(row["text"], row["windows"], row["length"]) for row in rows} == {("wikitext2", "2", "64")}
    worst = max((row for row in units if row["layer"] != "all"), key=lambda row: float(row["kl"]))
    lines = [line.split()[:3] for line in shown.get().splitlines()]
    shown_first = next(line for line in lines if len(line) == 3 and line[0] in ("0", "1"))
    assert shown_first == [worst["block"], worst["layer"], f"{float(worst['kl']):.1e}"]
    assert not list(run_copy.glob("*.partial"))


@torch.no_grad()
def test_the_numbers_are_those_of_the_model_of_the_run(run_copy: Path, sharp_model: Path, located: str) -> None:
    rows = audit(run_copy, located, "windows=1000")
    metrics = json.loads((run_copy / "metrics.json").read_text())
    assert int(rows[0]["windows"]) == metrics["windows/wikitext2"]
    assert float(rows[1]["ppl"]) == pytest.approx(metrics["ppl/wikitext2"], rel=1e-5)
    assert float(rows[1]["kl"]) == pytest.approx(metrics["agreement/wikitext2/kl"], rel=1e-4)
    assert "kl_restored" not in rows[0]
    # One weight, against a model that transformers has loaded.
    model = AutoModelForCausalLM.from_pretrained(sharp_model).double()
    layer = linear_layers(InMemoryModel(model).blocks[1])["fc1"]
    reference = _tokens(model, run_copy)
    layer.replace(FinishedBlocks(run_copy, {}).layers(1, "cpu")["fc1"].weight.double())
    changed = _tokens(model, run_copy)
    kl = (reference.exp() * (reference - changed)).sum(-1).mean().item()
    (row,) = [row for row in rows if (row["block"], row["layer"]) == ("1", "fc1")]
    assert float(row["kl"]) == pytest.approx(kl, rel=1e-3)


def _tokens(model: torch.nn.Module, run: Path) -> torch.Tensor:
    """Log-probabilities of all predicted tokens, float64."""
    kept = open_run(run, str(Path(model.name_or_path)))  # pyright: ignore[reportArgumentType]
    _, ids = first_windows(kept, None, 1000, None, None)
    return model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)


def test_another_file_shorter_windows_and_half_precision(run_copy: Path, located: str, tmp_path: Path) -> None:
    rows = audit(run_copy, located, f"to={tmp_path / 'new' / 'short.csv'}", "length=16", "windows=3", "dtype=run")
    assert {(row["windows"], row["length"]) for row in rows} == {("3", "16")}
    assert not (run_copy / "audit.csv").exists()


def test_a_run_in_half_precision(make_run: MakeRun, located: str) -> None:
    run = make_run("model.dtype=bfloat16", "method=gptq", "bits=4")
    single, half = (audit(run, located, f"dtype={dtype}") for dtype in ("float32", "run"))
    worst = max(single[2:], key=lambda row: float(row["kl"]))
    (same,) = [row for row in half if (row["block"], row["layer"]) == (worst["block"], worst["layer"])]
    assert float(same["kl"]) == pytest.approx(float(worst["kl"]), rel=0.5)


def test_a_model_with_a_name_needs_no_place(tmp_path: Path) -> None:
    folder = next((ROOT / "results" / "tiny" / "tiny").glob("gptq-3b-*"))
    model = with_place(stored_settings(folder).model, None)
    assert Path(model.path) == ROOT / "runners" / "tiny"
    assert (model.name, model.dtype) == ("tiny", "float32")
    assert with_place(model, str(tmp_path)).path == str(tmp_path)


def refused(run: Path, *settings: str) -> str:
    with pytest.raises(InputError) as error:
        audit(run, *settings)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert not list(run.glob("audit.csv*"))
    return sentence


@pytest.mark.parametrize(
    ("setting", "sentence"),
    {
        "text=c4": "the run was not evaluated on a text c4: there are wikitext2",
        "text=wikitext": "did you mean wikitext2?",
        "windows=0": "windows must be at least 1, not 0",
        "length=65": "length must be from 2 to the 64 tokens of the run's windows, not 65",
        "by=row": "by: invalid choice",
        "data_root=nowhere": "is not in the data root",
        "device=cuda:77": "device=cuda:77 cannot be used",
        "to=/proc/nowhere/audit.csv": "nothing can be written to /proc/nowhere",
        "model=nowhere/toy": "nowhere/toy",
    }.items(),
)
def test_a_wrong_setting_gets_a_sentence(setting: str, sentence: str, run_copy: Path, located: str) -> None:
    others = [located] if not setting.startswith("model=") else []
    words = [str(run_copy), *(["device=cpu"] if not setting.startswith("device=") else []), *others, setting]
    with pytest.raises(InputError) as error:
        invoke(words, main)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_that_cannot_be_audited(make_run: MakeRun, run_copy: Path, located: str, tmp_path: Path) -> None:
    assert "has not kept its quantized weights: run it again with keep_checkpoint=always" in refused(
        make_run("keep_checkpoint=never"), located
    )
    assert "is the unquantized model's" in refused(make_run("method=fp16"), located)
    assert "there is no run in" in refused(tmp_path, located)
    assert "by its content, not by its place: add model=FOLDER" in refused(run_copy)
    (run_copy / "metrics.json").unlink()
    assert "is not finished" in refused(run_copy, located)


def test_a_run_that_failed(run_copy: Path, located: str) -> None:
    file = run_copy / "metrics.json"
    metrics = json.loads(file.read_text()) | {"status": "failed", "stage": "evaluate", "error": "no data"}
    file.unlink()
    RunFolder(run_copy).write_metrics(metrics)
    assert "is failed (no data)" in refused(run_copy, located)


def test_a_model_that_has_changed_since(run_copy: Path, sharp_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(sharp_model, tmp_path / "sharp"))
    assert audit(run_copy, f"model={other}", "windows=1")  # a copy elsewhere is the same model
    (run_copy / "audit.csv").unlink()
    changed = Path(shutil.copytree(sharp_model, tmp_path / "changed"))
    weights = load_file(changed / "model.safetensors")
    weights["model.decoder.layers.0.fc1.weight"][0, 0] += 1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    assert "is not the one that the run has quantized" in refused(run_copy, f"model={changed}")


@pytest.mark.parametrize("name", ["block-00001.safetensors", "block-00001.json", "block-00000.safetensors"])
def test_damaged_weights(name: str, run_copy: Path, located: str) -> None:
    file = run_copy / "checkpoint" / name
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    assert "one of the 2 blocks is missing, damaged or of another run" in refused(run_copy, located)


def test_weights_of_another_run(make_run: MakeRun, run_copy: Path, located: str) -> None:
    other = make_run("method=gptq")
    shutil.rmtree(run_copy / "checkpoint")
    shutil.copytree(other / "checkpoint", run_copy / "checkpoint")
    assert "of another run" in refused(run_copy, located)


def test_a_damaged_configuration(run_copy: Path, located: str) -> None:
    file = run_copy / "config.yaml"
    file.write_text(file.read_text().replace("class: Text\n", "class: Novel\n"))
    assert "config.yaml is damaged (" in refused(run_copy, located)
    RunFolder(run_copy).write_metrics(read(run_copy / METRICS))
    assert "config.yaml cannot be read ('Novel')" in refused(run_copy, located)


def test_an_interrupt_leaves_the_old_result_and_no_half_file(
    run_copy: Path, located: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit(run_copy, located, "windows=1")
    before = sorted(run_copy.iterdir()), (run_copy / "audit.csv").read_bytes()
    measure, count = Walks.measure, 0

    def interrupted(self: Walks):
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return measure(self)

    monkeypatch.setattr(Walks, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audit(run_copy, located, "windows=2")
    assert (sorted(run_copy.iterdir()), (run_copy / "audit.csv").read_bytes()) == before


def test_a_model_without_room_is_refused_before_it_is_loaded(
    run_copy: Path, located: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}[name])
    assert "an audit holds the whole model, which does not fit" in refused(run_copy, located)


def test_memory_that_runs_out_gets_a_sentence(run_copy: Path, located: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Walks) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Walks, "measure", full)
    assert "fewer windows (windows=4)" in refused(run_copy, located)


def test_a_text_that_is_another_now_is_said(
    run_copy: Path, located: str, data_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(data_root, tmp_path / "data"))
    file = root / "wikitext2" / "test.jsonl"
    file.write_text("".join(sorted(file.read_text().splitlines(keepends=True), reverse=True)))
    audit(run_copy, located, f"data_root={root}", "windows=1")
    assert "is not the one that the run was evaluated on" in caplog.text

"""Where the token that begins texts is: in the ids, in the protocol's name, in the result."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from analysis.collect import collect
from runners.data import bos
from runners.data.bos import resolve_bos
from runners.data.calibration import Calibration, draw_sequences
from runners.data.datasets import HubDataset
from runners.data.windows import Text, cut_windows
from runners.errors import InputError
from runners.results.metrics import base_protocol, bos_warning
from runners.results.tables import results_table
from runners.run.experiment import run_cell
from tests.conftest import TOKENIZER, ToySettings

WIKITEXT2 = HubDataset("wikitext2", "Salesforce/wikitext", "test", "text", config="wikitext-2-raw-v1")
C4_TRAIN = HubDataset("c4", "allenai/c4", "train", "text")
LENGTH = 16


@pytest.fixture
def adds_bos(model_copy: Path) -> Path:
    """The toy with a tokenizer that begins every text with its token 0."""
    file = model_copy / "tokenizer.json"
    content = json.loads(file.read_text())
    name = content["added_tokens"][0]["content"]
    special = {name: {"id": name, "ids": [0], "tokens": [name]}}
    a, b = ({"Sequence": {"id": which, "type_id": place}} for place, which in enumerate("AB"))
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, a]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": single, "pair": [*single, b], "special_tokens": special
    }  # fmt: skip
    file.write_text(json.dumps(content))
    return model_copy


@pytest.fixture
def tokenizer(adds_bos: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(adds_bos)


@pytest.mark.parametrize(
    ("setting", "model_type", "meaning"),
    [
        ("auto", "opt", "text"), ("auto", "llama", "text"), ("auto", "gemma3_text", "window"), ("auto", "gemma2", "window"),
        ("auto", "recurrent_gemma", "window"), ("text", "gemma2", "text"), ("none", "gemma2", "none"),
        ("window", "opt", "window"),
    ],
)  # fmt: skip
def test_the_rule(setting: str, model_type: str, meaning: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert resolve_bos(setting, tokenizer, model_type) == meaning


def test_the_rule_for_a_tokenizer_that_adds_nothing() -> None:
    plain = AutoTokenizer.from_pretrained(TOKENIZER)
    assert resolve_bos("auto", plain, "gemma2") == "none"
    assert resolve_bos("text", plain, "opt") == "none"
    assert resolve_bos("window", plain, "opt") == "window"
    plain.bos_token = None
    with pytest.raises(InputError, match="bos=window needs a BOS token, and the tokenizer has none"):
        resolve_bos("window", plain, "opt")


def test_windows_and_their_protocol(data_root: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = Text("gptq", WIKITEXT2)
    rows = WIKITEXT2.rows(str(data_root))
    plain = tokenizer("\n\n".join(rows), add_special_tokens=False)["input_ids"]
    cut = {kind: cut_windows("t", text, tokenizer, LENGTH, str(data_root), kind) for kind in ("text", "window", "none")}
    assert cut["text"].ids.flatten().tolist() == [0, *plain][: cut["text"].ids.numel()]
    assert cut["none"].ids.flatten().tolist() == plain[: cut["none"].ids.numel()]
    assert cut["window"].ids[:, 0].tolist() == [0] * len(cut["window"].ids)
    own = cut["window"].ids[:, 1:].flatten().tolist()
    assert own == plain[: len(own)]
    assert len(plain) - len(own) < LENGTH - 1
    names = {kind: windows.protocol for kind, windows in cut.items()}
    assert names == {"text": "gptq", "window": "gptq, BOS in every window", "none": "gptq, no BOS"}
    assert {kind: windows.bos for kind, windows in cut.items()} == {kind: kind for kind in names}
    assert {base_protocol(name) for name in names.values()} == {"gptq"}
    assert base_protocol("mine, joined, no BOS") == base_protocol("mine, joined, BOS in every window") == "mine, joined"
    assert base_protocol("mine, shuffled") == "mine, shuffled"  # a name's own comma ends nothing
    assert cut_windows("t", text, tokenizer, LENGTH, str(data_root)).sha256 == cut["text"].sha256


@pytest.mark.parametrize("sampling", ["documents", "joined"])
def test_calibration_sequences(sampling: str, data_root: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    calibration = Calibration("c4", C4_TRAIN, sampling, num_sequences=12, held_out=2)
    drawn = {
        kind: draw_sequences(replace(calibration, bos=kind), tokenizer, LENGTH, 3, str(data_root))
        for kind in ("text", "window", "none")
    }
    assert {kind: sequences.bos for kind, sequences in drawn.items()} == {kind: kind for kind in drawn}
    for sequences in drawn.values():
        assert sequences.used.shape == (12, LENGTH)
    assert drawn["window"].used[:, 0].eq(0).all()
    assert drawn["window"].used[:, 1:].ne(0).all()
    assert drawn["none"].used.ne(0).all()
    assert drawn["text"].used[:, 1:].ne(0).all()


def test_a_run_says_where_it_is(toy_settings: ToySettings, adds_bos: Path, tmp_path: Path) -> None:
    options = ("method=rtn", f"model.path={adds_bos}", "calibration.held_out=2")
    runs = [
        run_cell(toy_settings(*options, f"evaluation.bos={kind}", f"calibration.bos={kind}"))
        for kind in ("auto", "window", "none")
    ]
    assert [run["protocol/wikitext2"] for run in runs] == ["gptq", "gptq, BOS in every window", "gptq, no BOS"]
    assert [run["bos/wikitext2"] for run in runs] == ["text", "window", "none"]
    assert [run["calibration/bos"] for run in runs] == ["text", "window", "none"]
    assert len({run["ppl/wikitext2"] for run in runs}) == len({run["digest"] for run in runs}) == 3
    with pytest.raises(ValueError, match="the runs on wikitext2 mix protocols: gptq, gptq, BOS in every window"):
        collect(tmp_path / "results" / "runs")


def test_an_unknown_setting_is_refused(toy_settings: ToySettings) -> None:
    for name in ("evaluation.bos", "calibration.bos"):
        with pytest.raises(InputError, match="bos must be one of auto, text, window, none, not always"):
            toy_settings(f"{name}=always")


def test_the_unquantized_model_is_asked_whether_it_needs_it(
    toy_settings: ToySettings, adds_bos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the losses of the model on the same window with another first token."""
    seen: dict[str, Any] = {}
    probes = bos.probes

    def keep(*arguments: Any) -> Any:
        seen.update(probes(*arguments))
        return seen

    monkeypatch.setattr("runners.run.stages.probes", keep)
    run = run_cell(toy_settings("method=fp16", f"model.path={adds_bos}"))
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(adds_bos).eval()
    assert torch.equal(seen["none"][:, 1:], seen["window"][:, 1:])
    for kind, key in {"none": "evaluate/ppl_without_bos", "window": "evaluate/ppl_with_bos"}.items():
        with torch.no_grad():
            loss = model(seen[kind], labels=seen[kind]).loss
        assert run[key] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert bos_warning(run) is None  # a random model does not care
    monkeypatch.undo()
    every = run_cell(toy_settings("method=fp16", f"model.path={adds_bos}", "evaluation.bos=window"))
    assert "evaluate/ppl_with_bos" not in every  # nothing to compare


def test_far_worse_without_it_is_a_sentence() -> None:
    found = {"evaluate/ppl_without_bos": 73.6, "evaluate/ppl_with_bos": 28.8}
    sentence = bos_warning(found)
    assert sentence is not None
    assert (
        "a perplexity of 73.60 without BOS and of 28.80 with it: evaluation.bos=window calibration.bos=window"
        in sentence
    )
    assert bos_warning({"evaluate/ppl_without_bos": 10.9, "evaluate/ppl_with_bos": 10.1}) is None
    assert bos_warning({}) is None
    run = {"status": "done", "method": "fp16", "model": "m", "parameters": 1} | found
    assert sentence in str(results_table([run]).renderables[1])


def test_windows_that_begin_with_it_are_not_asked() -> None:
    tokenizer: Any = SimpleNamespace(bos_token_id=0)
    assert bos.probes(torch.zeros(1, 4, dtype=torch.int64), "none", tokenizer) == {}
    assert bos.probes(torch.ones(1, 4, dtype=torch.int64), "none", SimpleNamespace(bos_token_id=None)) == {}  # pyright: ignore[reportArgumentType]
    assert set(bos.probes(torch.ones(2, 4, dtype=torch.int64), "text", tokenizer)) == {"none", "window"}

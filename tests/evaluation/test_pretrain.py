"""Training on toy text: it learns, and a run that is stopped and resumed ends with the same weights, bit for bit."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoModelForCausalLM

from runners.data.datasets import StandardLibrary
from runners.data.stdlib import Document, Kind, Part
from runners.errors import InputError
from runners.pretrain import data, export, training
from tests.conftest import PROJECT


@pytest.fixture(autouse=True)
def toy_text(monkeypatch: pytest.MonkeyPatch) -> None:
    def documents(kind: Kind, part: Part) -> list[Document]:
        return [Document(f"{part}{n}", kind, f"a line of {kind} {n} and another one\n" * 30) for n in range(8)]

    monkeypatch.setattr(data, "documents", documents)
    monkeypatch.setattr(StandardLibrary, "rows", lambda self, _: [d.text for d in documents(self.kind, self.part)])


def config(steps: int) -> DictConfig:
    cfg = OmegaConf.load(PROJECT / "conf" / "pretrain.yaml")
    assert isinstance(cfg, DictConfig)
    cfg.tokenizer.vocab_size = 300
    cfg.model.update(hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    cfg.training.update(steps=steps, batch_size=4, save_every=5, warmup_steps=2, device="cpu", bfloat16=False)
    return cfg


def test_a_resumed_training_ends_where_an_undisturbed_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(steps=15)
    whole, _, history = training.train(cfg, tmp_path / "whole")
    take_step = training.take_step

    def stop(*arguments):
        if arguments[4] == 12:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(training, "take_step", stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(cfg, tmp_path / "stopped")
    assert [path.name for path in (tmp_path / "stopped").glob("checkpoint*")] == ["checkpoint-10"]
    monkeypatch.undo()
    monkeypatch.setattr(data, "documents", lambda *_: pytest.fail("the tokens are there already"))
    resumed, _, again = training.train(cfg, tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [entry["step"] for entry in again] == [5, 10, 15]
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in history]
    assert history[-1]["loss"] < history[0]["loss"]


def test_the_training_of_another_model_is_not_continued(tmp_path: Path) -> None:
    training.train(config(steps=5), tmp_path)
    with pytest.raises(InputError, match="belongs to a training with other settings"):
        training.train(config(steps=6), tmp_path)


def test_what_is_exported_is_a_model_like_any_other(tmp_path: Path) -> None:
    cfg = config(steps=5)
    model, tokenizer, history = training.train(cfg, tmp_path)
    export.export(model, tokenizer, history, tmp_path / "model")
    export.write_card(model, tokenizer, cfg, tmp_path / "model", "a CPU", history)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.model_type == "opt"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| stdlib_docs |" in card
    assert "5 steps of 4 sequences" in card
    assert (tmp_path / "model" / "training.csv").read_text().startswith("step,tokens,seconds,loss,docs,source\n5,320,")


def test_every_step_draws_its_own_sequences() -> None:
    cfg = config(steps=5)
    streams = {f"train/{kind}": torch.arange(1000, dtype=torch.int32) for kind in data.KINDS}
    first, again, other = (data.draw(streams, cfg, step) for step in (3, 3, 4))
    assert first.shape == (4, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.diff(dim=1).eq(1).all()  # neighbors in the stream

"""The evaluation, block by block: it must be the model's own loss, and its distance from the unquantized one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from baselines.rtn import RTN
from quantease.grid import GridSpec
from runners.data.token_ids import ids_hash
from runners.evaluation.blockwise import BlockwiseEvaluation, ReferenceCache
from runners.evaluation.likelihood import measure_windows, window_losses
from runners.models.blocks import InMemoryModel
from runners.quantization.finished_blocks import FinishedBlocks
from runners.run.experiment import run_cell, run_experiment
from runners.storage.cache import Cache
from tests.conftest import ToySettings
from tests.families import FAMILIES, random_ids, random_model
from tests.quantize import quantize
from tests.runs.test_experiment import read_csv


def evaluate(model: Any, **options: Any) -> dict[str, list[float]]:
    ids = random_ids(5)
    texts = {"text": (ids, ids_hash(ids))}
    return BlockwiseEvaluation(InMemoryModel(model), texts, 2, **options).run()["text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_every_window_is_the_models_own(family: str) -> None:
    model = random_model(family)
    expected = torch.cat(list(window_losses(model, random_ids(5), batch_size=2)))
    measured = evaluate(model)
    assert measured.keys() == {"nll"}
    torch.testing.assert_close(torch.tensor(measured["nll"], dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["opt", "bloom", "gemma2"])
def test_the_distance_from_the_unquantized_model(family: str, tmp_path: Path) -> None:
    """KL and top-1 agreement against float64 sums over the vocabulary, position by position."""
    original, model, ids = random_model(family), random_model(family), random_ids(5)
    blocks = FinishedBlocks(tmp_path, {})
    quantize(InMemoryModel(model), random_ids(3), 3, RTN(), GridSpec(2), finished=blocks)
    references = ReferenceCache(Cache(tmp_path / "cache", 1.0), {})
    first = evaluate(random_model(family), blocks=blocks, references=references)
    again = evaluate(random_model(family), blocks=blocks, references=references)
    assert (references.cache.hits, references.cache.misses) == (1, 1)
    assert again == first
    p, q = (m(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1) for m in (original, model))
    torch.testing.assert_close(
        torch.tensor(first["kl"]).double(), (p.exp() * (p - q)).sum(-1).mean(1), rtol=1e-4, atol=1e-7
    )
    agree = (p.argmax(-1) == q.argmax(-1)).double().mean(1)
    torch.testing.assert_close(torch.tensor(first["top1"]).double(), agree)
    torch.testing.assert_close(
        torch.tensor(first["nll"]).double(), -q.gather(-1, ids[:, 1:, None]).mean((1, 2)), rtol=1e-5, atol=1e-6
    )
    assert min(first["kl"]) > 0


def test_a_model_does_not_differ_from_itself() -> None:
    logits, ids = torch.randn(3, 300, 11), torch.randint(11, (3, 300))
    same = measure_windows(logits, ids, logits.clone())
    assert same["kl"].abs().max() < 1e-7
    assert same["top1"].eq(1).all()


def test_runs_carry_their_distance_from_the_reference(toy_settings: ToySettings) -> None:
    reference, row = run_experiment(toy_settings("method=rtn", "bits=2"))
    assert "agreement/wikitext2/kl" not in reference
    assert abs(reference["agreement/wikitext2/kl_floor"]) < 1e-6 < row["agreement/wikitext2/kl"]  # float32
    assert reference["agreement/wikitext2/top1_floor"] > 0.99
    assert row["agreement/wikitext2/kl_median"] < row["agreement/wikitext2/kl_p90"] < row["agreement/wikitext2/kl_p99"]
    assert row["agreement/wikitext2/kl"] > 0
    assert 0 <= row["agreement/wikitext2/top1"] <= 1
    settings = toy_settings("method=rtn", "bits=2")
    windows = read_csv(settings.folder / "windows.csv")
    mean = sum(float(window["kl"]) for window in windows) / len(windows)
    assert row["agreement/wikitext2/kl"] == pytest.approx(mean)
    another = run_cell(toy_settings("method=rtn", "bits=4"))
    assert another["agreement/wikitext2/kl"] < row["agreement/wikitext2/kl"]
    assert (another["cache/hits"], another["cache/misses"]) == (1, 0)  # the unquantized model walks once for all


def test_the_unquantized_model_walks_once(toy_settings: ToySettings, tmp_path: Path) -> None:
    """Its own run takes what another has walked, and measures the same."""
    first = run_cell(toy_settings("method=fp16"))
    again = run_cell(toy_settings("method=fp16", "force=true"))
    other = run_cell(toy_settings("method=fp16", f"results={tmp_path / 'other'}"))
    assert [(row["cache/hits"], row["cache/misses"]) for row in (first, again, other)] == [(0, 1), (1, 0), (0, 1)]
    assert first["ppl/wikitext2"] == again["ppl/wikitext2"] == other["ppl/wikitext2"]


def test_the_distance_need_not_be_measured(toy_settings: ToySettings) -> None:
    row = run_cell(toy_settings("method=rtn", "evaluation.agreement=false"))
    assert not [key for key in row if key.startswith("agreement/")]

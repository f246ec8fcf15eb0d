"""KL beside its mean: quantiles, by confidence, and the noise floor."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from runners.data.token_ids import ids_hash
from runners.evaluation import blockwise, likelihood
from runners.evaluation.blockwise import BlockwiseEvaluation, ReferenceCache
from runners.evaluation.likelihood import measure_windows
from runners.evaluation.noise_floor import rounded_once_more
from runners.evaluation.token_agreement import TokenAgreement
from runners.models.blocks import InMemoryModel
from runners.results.metrics import CONFIDENCE_EDGES, confidence_kl, confidence_share
from runners.storage.cache import Cache
from tests.families import random_ids, random_model


def test_quantiles_and_buckets_are_those_of_all_tokens() -> None:
    """Against sums in float64, token by token; more positions than are computed at once."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.1, 9, 300)[None, :, None]  # from no confidence to certainty
    reference, logits = (torch.randn(2, 300, 11, generator=generator) * scale for _ in range(2))
    ids = torch.randint(11, (2, 300), generator=generator)
    tokens = TokenAgreement()
    measured = measure_windows(logits, ids, reference, tokens)
    found = tokens.summary()
    p, q = (some[:, :-1].double().log_softmax(-1) for some in (reference, logits))
    kl, confidence = (p.exp() * (p - q)).sum(-1).flatten().numpy(), p.exp().amax(-1).flatten().numpy()
    for name, share in {"kl_median": 50, "kl_p90": 90, "kl_p95": 95, "kl_p99": 99}.items():
        assert found[name] == pytest.approx(np.percentile(kl, share), rel=1e-4)
    assert measured["kl"].mean().item() == pytest.approx(kl.mean(), rel=1e-5)
    for bucket, (low, high) in enumerate(pairwise(CONFIDENCE_EDGES)):
        inside = (confidence >= low) & (confidence < (high if high < 1 else 2))
        assert found[confidence_share(bucket)] == pytest.approx(inside.mean(), abs=2 / 598)  # one token near an edge
        assert found[confidence_kl(bucket)] == pytest.approx(kl[inside].mean(), rel=2e-2)
    assert sum(found[confidence_share(bucket)] for bucket in range(5)) == pytest.approx(1)


def test_how_many_positions_are_computed_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, reference = (torch.randn(3, 150, 50, generator=generator) * 3 for _ in range(2))
    ids = torch.randint(50, (3, 150), generator=generator)
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").reshape(3, -1)
    for size in (1, 5000, 2**30):  # one position, some, and as many as on a GPU
        monkeypatch.setattr(likelihood, "CPU_BYTES", size)
        measured = measure_windows(logits, ids, reference, counted := TokenAgreement())
        assert torch.equal(measured["nll"], losses.double().mean(1))
        kl = torch.cat(counted.kl)
        assert len(kl) == 3 * 149
        assert measured["kl"].mean().item() == pytest.approx(kl.double().mean().item(), rel=1e-12)


def test_a_bucket_without_tokens_has_no_mean() -> None:
    tokens = TokenAgreement()
    certain = torch.tensor([[0.0, -torch.inf]])[None].log_softmax(-1)
    tokens.add(torch.zeros(1, 1), certain)
    found = tokens.summary()
    assert found[confidence_share(4)] == 1.0
    assert confidence_kl(0) not in found
    assert confidence_kl(4) == "kl_confidence_80_100"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_more_rounding_has_the_variance_of_a_rounding(dtype: torch.dtype) -> None:
    hidden = (torch.rand(400, 500, generator=torch.Generator().manual_seed(0)) + 1).to(dtype)  # one ulp for all
    hidden *= torch.where(torch.arange(500) % 2 == 0, 1, -1)
    error = (rounded_once_more(hidden, seed=3).double() - hidden.double()) / torch.finfo(dtype).eps
    assert set(error.abs().unique().tolist()) <= {0.0, 0.5, 1.0, 2.0}  # around a power of two the ulp changes
    inner = error[(hidden.abs() > 1) & (hidden.abs() < 2)]
    assert inner.square().mean().item() == pytest.approx(1 / 12, rel=0.03)
    assert abs(inner.mean().item()) < 0.003
    assert torch.equal(rounded_once_more(hidden, seed=3), rounded_once_more(hidden, seed=3))
    assert not torch.equal(rounded_once_more(hidden, seed=3), rounded_once_more(hidden, seed=4))
    assert torch.equal(rounded_once_more(hidden, seed=3, share=0), hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_has_no_neighbor_stays(dtype: torch.dtype) -> None:
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    hidden = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, largest, -largest, smallest], dtype=dtype)
    for seed in range(20):
        moved = rounded_once_more(hidden, seed, share=1.0)
        assert torch.equal(moved[:4], hidden[:4])
        assert moved[4].isnan()
        assert torch.isfinite(moved[5:]).all()
        assert (moved[5:].double() - hidden[5:].double()).abs().max() <= largest * 2.0 ** -(
            7 if dtype is torch.bfloat16 else 10
        )


def floor_of(model: Any, folder: Path) -> tuple[float, dict[str, list[float]]]:
    ids = random_ids(5)
    references = ReferenceCache(Cache(folder, 1.0), {})
    evaluation = BlockwiseEvaluation(InMemoryModel(model), {"text": (ids, ids_hash(ids))}, 2, references=references)
    measured = evaluation.run()["text"]
    assert evaluation.token_summary("text") == {}  # it is compared with itself only
    return float(np.mean(measured["kl_floor"])), measured


def test_the_floor_is_the_same_each_time_and_higher_in_coarser_numbers(tmp_path: Path) -> None:
    fine, first = floor_of(random_model("llama"), tmp_path / "fine")
    again, second = floor_of(random_model("llama"), tmp_path / "fine")  # whose activations are kept
    assert first == second
    assert fine == again
    coarse, _ = floor_of(random_model("llama").bfloat16(), tmp_path / "coarse")
    assert 5 * abs(fine) < coarse < 1e-2


def test_without_moves_there_is_no_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "rounded_once_more", lambda hidden, seed: hidden)
    floor, measured = floor_of(random_model("llama"), tmp_path)
    assert abs(floor) < 1e-7
    assert measured["top1_floor"] == [1.0] * 5

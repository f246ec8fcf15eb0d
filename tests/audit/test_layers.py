"""The audit of every layer equals the plain computation: the whole model with one weight replaced, in float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from baselines.rtn import RTN
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, QuantizedLayer
from runners.audit.damage import damage_of
from runners.audit.layers import ALL, NONE, Change, LayerAudit
from runners.models.activations import BlockActivations
from runners.models.blocks import InMemoryModel, linear_layers
from tests.family_zoo import small_model, token_ids

IDS = token_ids(count=3, length=24)
FAMILIES = ["opt", "gpt2", "gemma4_text", "bloom", "mixtral", "qwen3_next"]  # shared keys, alibi, experts, recurrences


class Quantized:
    """Quantized layers of a model, as finished blocks give them."""

    def __init__(self, model: Any, bits: int = 2) -> None:
        self._blocks = [
            {name: rounded(layer.weight.float(), bits) for name, layer in linear_layers(block).items()}
            for block in InMemoryModel(model).blocks
        ]

    def layers(self, index: int, _device: str) -> dict[str, QuantizedLayer]:
        return self._blocks[index]


def rounded(weight: Tensor, bits: int) -> QuantizedLayer:
    hessian = torch.eye(weight.shape[1])
    return RTN().solve(LayerProblem(weight, hessian), GridSpec(bits, None))


def audit_of(model: Any, finished: Any, batch_size: int = 2, dtypes: Any = None) -> LayerAudit:
    dtypes = dtypes or {name: parameter.dtype for name, parameter in model.named_parameters()}
    return LayerAudit(InMemoryModel(model), finished, dtypes, IDS, batch_size)


def run(audit: LayerAudit, *by: str, restore: bool = False) -> dict[tuple[int | None, str], Change]:
    changes = audit.run(by or ("layer",), restore, lambda _: None)
    return {(change.block, change.layer): change for change in changes}


@torch.no_grad()
def direct(model: Any, reference: Tensor) -> tuple[Tensor, Tensor]:
    """KL of every predicted token (windows, positions) and the loss of each window, from whole logits in float64."""
    logits = model(IDS, use_cache=False).logits.double()[:, :-1]
    expected = reference.log_softmax(-1)
    kl = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)
    losses = cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").reshape(len(IDS), -1)
    return kl, losses.mean(1)


@contextmanager
def replaced(model: Any, finished: Any, chosen: Callable[[int, str], bool]) -> Iterator[None]:
    """The model with the quantized weights of the chosen layers."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for index, block in enumerate(InMemoryModel(model).blocks):
        for name, layer in linear_layers(block).items():
            if chosen(index, name):
                layer.replace(finished.layers(index, "cpu")[name].weight)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_layer_alone_and_one_restored_are_what_the_whole_model_gives(family: str) -> None:
    model = small_model(family)
    finished = Quantized(model)
    found = run(audit_of(model, finished), "layer", "block", restore=True)
    reference = model(IDS, use_cache=False).logits.double()[:, :-1]
    checked = list(found)[:2] + list(found)[2::5]  # of all layers a sample, among it whole blocks
    assert any(name == ALL and block is not None for block, name in found)
    for block, name in checked:

        def is_meant(index: int, layer: str, block: int | None = block, name: str = name) -> bool:
            return name != NONE and block in (None, index) and name in (ALL, layer)

        with replaced(model, finished, is_meant):
            kl, losses = direct(model, reference)
        alone = found[block, name].alone
        assert alone.kl == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-7)
        assert alone.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-3, abs=1e-6)
        assert alone.ppl == pytest.approx(losses.mean().exp().item(), rel=1e-5)
        assert alone.kl_first_positions == pytest.approx(kl[:, :4].mean().item(), rel=1e-3, abs=1e-6)
        assert alone.kl_rest == pytest.approx(kl[:, 4:].mean().item(), rel=1e-3, abs=1e-6)
        restored = found[block, name].restored
        if restored is not None:
            with replaced(model, finished, lambda index, layer, meant=is_meant: not meant(index, layer)):
                kl, losses = direct(model, reference)
            assert restored.kl == pytest.approx(kl.mean().item(), rel=1e-3, abs=1e-7)
            assert restored.ppl == pytest.approx(losses.mean().exp().item(), rel=1e-5)


def test_the_audit_gives_the_model_its_weights_back() -> None:
    model = small_model("opt")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run(audit_of(model, Quantized(model)), restore=True)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


class Unchanged:
    """Quantized layers whose weights are the model's own."""

    def __init__(self, model: Any) -> None:
        self._blocks = [
            {name: _Weight(layer.weight.clone()) for name, layer in linear_layers(block).items()}
            for block in InMemoryModel(model).blocks
        ]

    def layers(self, index: int, _device: str) -> Any:
        return self._blocks[index]


class _Weight:
    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


def test_with_everything_in_full_precision_there_is_no_divergence() -> None:
    model = small_model("opt")
    changes = run(audit_of(model, Unchanged(model)), "layer", "block", restore=True)
    assert len(changes) == 2 + 3 * (6 + 1)
    for change in changes.values():
        for damage in (change.alone, change.restored or change.alone):
            assert (damage.kl, damage.kl_p99, damage.share_top_percent) == (0, 0, None)
            assert damage.ppl == changes[None, NONE].alone.ppl


def test_a_layer_that_does_not_matter_alone_is_told_from_one_that_does() -> None:
    model = small_model("opt")
    finished: Any = Unchanged(model)
    broken = linear_layers(InMemoryModel(model).blocks[1])["fc1"].weight
    finished.layers(1, "cpu")["fc1"] = _Weight(torch.zeros_like(broken))
    changes = run(audit_of(model, finished), restore=True)
    whole = changes[None, ALL].alone.kl
    assert whole > 0
    for (block, name), change in changes.items():
        if block is not None and change.restored is not None:
            is_broken = (block, name) == (1, "fc1")
            assert change.alone.kl == pytest.approx(whole if is_broken else 0)
            assert change.restored.kl == pytest.approx(0 if is_broken else whole)


def test_weights_are_rounded_as_the_run_has_stored_them() -> None:
    model = small_model("opt")
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    finished = Quantized(model)
    stored = {name: torch.bfloat16 for name, _ in model.named_parameters()}
    changes = run(audit_of(model, finished, dtypes=stored))
    reference = model(IDS, use_cache=False).logits.double()[:, :-1]
    weight = linear_layers(InMemoryModel(model).blocks[0])["fc1"]
    before = weight.weight.clone()
    weight.replace(finished.layers(0, "cpu")["fc1"].weight.bfloat16())
    kl, _ = direct(model, reference)
    assert changes[0, "fc1"].alone.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    weight.replace(before)


def test_the_batch_size_does_not_matter() -> None:
    model = small_model("gemma4_text")
    one, three = (run(audit_of(model, Quantized(model), size), restore=True) for size in (1, 3))
    for key, change in one.items():
        assert change.alone.kl == pytest.approx(three[key].alone.kl, rel=1e-3, abs=1e-7)


def test_a_change_runs_the_blocks_from_its_own_on_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    visited: list[int] = []
    advance = BlockActivations.advance

    def counted(self: BlockActivations, index: int) -> None:
        visited.append(index)
        advance(self, index)

    monkeypatch.setattr(BlockActivations, "advance", counted)
    model = small_model("opt")
    run(audit_of(model, Quantized(model)))
    layers, blocks = 6, 3
    assert len(visited) == 2 * blocks + layers * (3 + 2 + 1)


def test_the_share_of_the_top_percent_and_the_first_positions() -> None:
    kl = torch.zeros(2, 100)
    kl[0, 7] = kl[1, 2] = 3.0  # two of 200 tokens have three quarters
    kl[1, 50:70] = 0.1
    damage = damage_of(kl, torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert damage.share_top_percent == pytest.approx(0.75)
    assert damage.kl == pytest.approx(8 / 200)
    assert damage.kl_first_positions == pytest.approx(3 / 8)
    assert damage.kl_rest == pytest.approx(5 / 192)
    assert damage.ppl == pytest.approx(torch.tensor(2.0).exp().item())
    assert damage_of(torch.ones(1, 3), torch.ones(1).double()).kl_rest is None

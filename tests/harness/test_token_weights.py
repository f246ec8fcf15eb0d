"""What the calibration weighs: tokens of length one, the energy of the tokens, and an error in which all count alike."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from runners.models.blocks import InMemoryModel
from runners.models.memory import Memory
from runners.quantization import measuring as module
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.input_statistics import InputStatistics, StatisticsCache
from runners.quantization.layer_errors import relative_error, token_error
from runners.quantization.token_energy import TokenEnergy
from runners.results.layers import LayerRecord, ruled_by_few_tokens
from runners.results.metrics import grid_words
from runners.run.experiment import run_cell
from runners.storage.cache import Cache
from tests.conftest import ToySettings
from tests.families import random_ids, random_model

LENGTH = 24


def measured(memory: Memory | None = None, *, held_out: int = 0, **options: Any) -> tuple[Any, list[InputStatistics]]:
    """The statistics of a small Llama's first block, and its activations object."""
    ids = random_ids(7 + held_out, LENGTH)
    source = InMemoryModel(random_model("llama"))
    activations = CalibrationActivations(source, ids[:7], 3, ids[7:] if held_out else None, memory, **options)
    with source.open_block(0), torch.no_grad():
        inputs = inputs_of(activations)
        statistics = [entry for _, entry in activations.statistics(activations.input_groups())]
    return inputs, statistics


def inputs_of(activations: CalibrationActivations) -> list[Tensor]:
    """The input of every input group for all sequences, (sequences, length, in), by plain hooks."""
    groups = activations.input_groups()
    seen: dict[str, list[Tensor]] = {names[0]: [] for names in groups}
    made = activations._embedded()

    def keep(name: str) -> Any:
        return lambda _module, args: seen[name].append(args[0])

    handles = [made.blocks[0].get_submodule(name).register_forward_pre_hook(keep(name)) for name in seen]
    for _ in made.run(0):
        pass
    for handle in handles:
        handle.remove()
    return [torch.cat(batches) for batches in seen.values()]


@pytest.mark.parametrize("parts", [1, 4])
def test_every_token_is_scaled_to_length_one(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 10)
    inputs, statistics = measured(Memory(hessian_parts=parts, batch_size=2), length_one=True)
    assert len(inputs) == len(statistics) == 4
    for x, found in zip(inputs, statistics, strict=True):
        x = x.flatten(0, 1).double()
        x = x / x.norm(dim=1, keepdim=True)
        assert_close(found.hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-7)
        assert_close(found.mean_input.double(), x.abs().mean(0), rtol=1e-5, atol=1e-7)
        assert found.hessian.trace().item() == pytest.approx(1, rel=1e-5)


def test_a_token_without_input_stays_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [3e-25, 4e-25], [3e25, 4e25]])
    assert_close(module._at_length_one(x, x), torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))
    assert module._at_length_one(x.half(), x.half()).dtype == torch.float32


def test_held_out_sequences_are_never_scaled() -> None:
    _, plain = measured(held_out=4)
    _, scaled = measured(held_out=4, length_one=True)
    for mine, theirs in zip(plain, scaled, strict=True):
        assert mine.held_out is not None
        assert theirs.held_out is not None
        assert torch.equal(mine.held_out, theirs.held_out)
        assert mine.held_out_tokens is not None
        assert theirs.held_out_tokens is not None
        assert torch.equal(mine.held_out_tokens, theirs.held_out_tokens)
        assert mine.energy == theirs.energy
        assert not torch.equal(mine.hessian, theirs.hessian)


@pytest.mark.parametrize("batch_size", [None, 1])
def test_energy_is_of_all_calibration_tokens(batch_size: int | None) -> None:
    inputs, statistics = measured(Memory(batch_size=batch_size), held_out=4)
    for x, found in zip(inputs, statistics, strict=True):
        energies = x[:7].double().square().sum(-1)
        ordered = sorted(energies.flatten().tolist(), reverse=True)
        assert found.energy.top_percent == pytest.approx(sum(ordered[:2]) / sum(ordered), rel=1e-5)  # 1 % of 168
        assert found.energy.max_over_median == pytest.approx(ordered[0] / (ordered[83] + ordered[84]) * 2, rel=1e-5)
        places = energies.argmax(1).tolist()
        assert found.energy.position_share == max(map(places.count, places)) / 7
        assert places.count(found.energy.position) == max(map(places.count, places))


def test_energy_where_nothing_can_be_told() -> None:
    assert TokenEnergy.of([torch.zeros(2, 3)]) == TokenEnergy()
    assert TokenEnergy.of([torch.tensor([[math.inf, 1.0]])]) == TokenEnergy()
    assert TokenEnergy.of([torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 1.5]])]).position == 2  # zeros have no largest
    mostly_zero = TokenEnergy.of([torch.tensor([[0.0, 0.0, 2.0]])])
    assert mostly_zero == TokenEnergy(1.0, None, 2, 1.0)
    expert = TokenEnergy.of([torch.tensor([1.0, 3.0]), torch.tensor([2.0])])
    assert (expert.position, expert.position_share, expert.max_over_median) == (None, None, 1.5)  # of 1, 2, 3
    for energy in (TokenEnergy(), mostly_zero, expert):
        assert TokenEnergy.from_tensor(energy.tensor) == energy


@pytest.mark.parametrize("batch_size", [None, 1])
def test_held_out_tokens_come_from_all_positions(batch_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOKENS", 24)  # of 4 x 24: every 4th shares 4 with the length, so every 5th
    inputs, statistics = measured(Memory(batch_size=batch_size), held_out=4)
    for x, found in zip(inputs, statistics, strict=True):
        assert found.held_out_tokens is not None
        assert torch.equal(found.held_out_tokens, x[7:].flatten(0, 1)[::5])


def test_the_distance_of_held_out_tokens_shares_no_divisor_with_the_length() -> None:
    assert module._HeldOutTokens(16 * 2048, 2048)._every == 17
    assert module._HeldOutTokens(100, 24)._every == 1


def test_token_error_is_a_mean_of_ratios() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, error, x = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (6, 8), (50, 8)))
    x[0] *= 1e4  # a token that decides every sum
    x[1] = 0
    written = weight + 0.1 * error
    w, w_hat, tokens = weight.double(), written.double(), x.double()
    ratios = [((w - w_hat) @ t).square().sum() / (w @ t).square().sum() for t in tokens if t.any()]
    for slices in (1, 4):
        assert token_error(weight, written, x, slices) == pytest.approx(torch.stack(ratios).mean().item(), rel=1e-4)
    assert token_error(torch.zeros(6, 8), written, x) is None
    of_the_first = ratios[0].item()
    assert relative_error(weight, written, x.T @ x / 50) == pytest.approx(of_the_first, rel=1e-3)


@pytest.mark.parametrize(("inputs", "weights"), [(1e-30, 1.0), (1e30, 1.0), (1.0, 1e-24), (1.0, 1e24)])
def test_token_error_whatever_the_scale(inputs: float, weights: float) -> None:
    weight, x = torch.ones(4, 8) * weights, torch.ones(5, 8) * inputs
    assert token_error(weight, weight * 1.1, x) == pytest.approx(0.01, rel=1e-3)


def test_an_input_without_order_of_its_own_is_told_by_its_size() -> None:
    """OPT joins the sequences before its MLP; an expert sees some of the tokens."""
    energies = module._Energies(tokens=12, length=4)
    for _ in range(3):
        energies.add("fc1", torch.eye(4) * torch.tensor([1.0, 1.0, 3.0, 1.0]))  # a sequence as four rows
    assert (energies.of("fc1").position, energies.of("fc1").position_share) == (2, 1.0)
    energies.add("expert", torch.ones(4, 2))
    assert energies.of("expert").position is None


def test_a_layer_that_no_held_out_token_reaches() -> None:
    sums = module._Sums()
    sums.tokens["expert"] = 5
    assert not sums.has("expert")


def test_kept_statistics_are_whole(tmp_path: Any) -> None:
    _, statistics = measured(held_out=4)
    cache = StatisticsCache(Cache(tmp_path, 1), {"key": 1}, torch.device("cpu"))
    cache.put(3, [((str(place),), entry) for place, entry in enumerate(statistics)])
    kept = cache.get(3)
    assert kept is not None
    for entry, (_, again) in zip(statistics, kept, strict=True):
        assert entry.energy == again.energy
        assert entry.tensors.keys() == again.tensors.keys()
        assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in entry.tensors.items())


METHODS = ("rtn", "gptq", "quantease", "quantease_outlier", "quantease_structured", "quantease_refit", "spqr", "awq")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_tokens_of_length_one(method: str, toy_settings: ToySettings) -> None:
    plain = toy_settings(f"method={method}", "calibration.held_out=2")
    scaled = toy_settings(f"method={method}", "calibration.held_out=2", "calibration.token_weights=length_one")
    assert plain.digest != scaled.digest
    assert plain.series != scaled.series
    run, other = run_cell(plain), run_cell(scaled)
    assert (run["status"], other["status"]) == ("done", "done")
    assert (run["token_weights"], other["token_weights"]) == ("uniform", "length_one")
    assert grid_words(other) == f"{grid_words(run)} length-one tokens"
    assert 0 < other["layers/mean_token_error"] < 1
    assert (run["checkpoint/sha256"] == other["checkpoint/sha256"]) == (method == "rtn")  # which looks at no input


def test_the_same_with_inputs_of_the_unquantized_model(toy_settings: ToySettings) -> None:
    options = ("method=gptq", "calibration.inputs=full_precision")
    plain = run_cell(toy_settings(*options))
    scaled = run_cell(toy_settings(*options, "calibration.token_weights=length_one"))
    assert scaled["cache/misses"] == 2  # Hessians of other weights are others'; the text's activations are found
    assert plain["checkpoint/sha256"] != scaled["checkpoint/sha256"]


def test_a_run_says_where_few_tokens_rule() -> None:
    even = LayerRecord(0, "q_proj", 4, 4, energy_top_percent=0.02)
    first = LayerRecord(28, "down_proj", 4, 4, energy_top_percent=0.79, energy_position=0)
    expert = LayerRecord(2, "w2", 4, 4, energy_top_percent=0.6)
    assert ruled_by_few_tokens([even]) is None
    sentence = ruled_by_few_tokens([even, expert, first])
    assert sentence is not None
    assert "down_proj in block 28 and 1 more layers are ruled by few tokens" in sentence
    assert "79% of the energy of its input, most often at position 0 of the window" in sentence
    assert "calibration.token_weights=length_one" in sentence
    assert (ruled_by_few_tokens([expert]) or "").startswith("w2 in block 2 is ruled")

"""Paired inputs: the cross moments are those of the two models' own forward passes; a killed run ends with the same bits."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.sparse import Outliers
from runners.errors import InputError
from runners.models.blocks import InMemoryModel, decoder_blocks, linear_layers
from runners.models.memory import Memory
from runners.quantization.calibration_activations import CalibrationActivations
from runners.quantization.finished_blocks import FinishedBlocks
from runners.quantization.layerwise import Quantization
from runners.quantization.paired_inputs import PairedInputs
from runners.run.experiment import run_cell
from runners.run.preflight import preflight
from tests.conftest import ToySettings
from tests.experts.conftest import checkpoint
from tests.families import random_ids, random_model
from tests.harness.test_resume import codes, measured


@dataclass(frozen=True)
class Spy(LayerSolver):
    """Rounds to nearest, or keeps the weights, and keeps the problems that it was given."""

    rounds: bool = True
    problems: list[LayerProblem] = field(default_factory=list)

    @property
    def needs_cross(self) -> bool:
        return True

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.problems.append(replace(problem, weight=problem.weight.clone()))
        grid = problem.fit_grid(spec)
        if self.rounds:
            return QuantizedLayer(grid.encode(problem.weight), grid)
        rows, columns = torch.ones_like(problem.weight).nonzero(as_tuple=True)
        everything = Outliers(rows, columns, problem.weight.flatten())
        return QuantizedLayer(grid.encode(torch.zeros_like(problem.weight)), grid, outliers=everything)


def quantize(model: Any, solver: Spy, ids: Tensor, true_sequential: bool = False, **options: Any) -> list[str]:
    """The names of the layers in the order in which they are solved, each with its block."""
    source, options = InMemoryModel(model), {"memory": Memory()} | options
    original = CalibrationActivations(source, ids, 4, memory=options["memory"])
    activations = CalibrationActivations(source, ids, 4, random_ids(3), in_step=original, **options)
    records = Quantization(PairedInputs(activations, original, true_sequential), solver, GridSpec(2)).run(
        lambda _: None
    )
    return [f"{record.block}.{record.layer}" for record in records]


@contextmanager
def inputs_of(model: Any, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The inputs of layers, `BLOCK.NAME` each, in what the model is sent in the context."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    layers = [linear_layers(block) for block in decoder_blocks(model)]
    handles = []
    for name in names:
        block, _, layer = name.partition(".")
        keep = seen[name]
        hook = lambda _m, args, keep=keep: keep.append(args[0].flatten(0, -2))
        handles.append(layers[int(block)][layer].module.register_forward_pre_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def inputs(model: Any, ids: Tensor, name: str) -> Tensor:
    with inputs_of(model, [name]) as seen:
        model(ids, use_cache=False)
    return torch.cat(seen[name]).double()


def hybrid(original: Any, quantized: Any, names: list[str]) -> Any:
    """The original model with the weights of some layers of the quantized one."""
    model = copy.deepcopy(original)
    for name in names:
        block, _, layer = name.partition(".")
        ours, theirs = (linear_layers(decoder_blocks(one)[int(block)])[layer] for one in (model, quantized))
        ours.replace(theirs.weight)
    return model


@pytest.mark.parametrize(
    ("family", "true_sequential"), [("llama", False), ("opt", True), ("gpt2", True), ("bloom", False)]
)
def test_the_cross_moments_are_sums_over_the_inputs_of_both_models(family: str, true_sequential: bool) -> None:
    model, ids, spy = random_model(family), random_ids(7), Spy()
    original = copy.deepcopy(model)
    # Parts of batches, too: the unquantized model's batch is whole, the quantized one's comes in two pieces.
    names = quantize(model, spy, ids, true_sequential, memory=Memory(batch_size=3))
    assert len(spy.problems) == len(names)
    for place, (name, problem) in enumerate(zip(names, spy.problems, strict=True)):
        group = [other for other, theirs in zip(names, spy.problems, strict=True) if theirs.cross is problem.cross]
        before = names[: names.index(group[0])]
        if not true_sequential:
            before = [other for other in before if other.partition(".")[0] != name.partition(".")[0]]
        x = inputs(original, ids, name)
        seen = inputs(hybrid(original, model, before), ids, name)
        assert problem.cross is not None
        assert problem.cross_half is not None
        tolerances: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5 * problem.hessian.abs().max().item()}
        torch.testing.assert_close(problem.hessian.double(), seen.T @ seen / len(x), **tolerances)
        torch.testing.assert_close(problem.cross.double(), (x - seen).T @ seen / len(x), **tolerances)
        odd = (torch.arange(len(x)) // ids.shape[1]) % 2 == 1
        half = (x - seen)[odd].T @ seen[odd] / len(x)
        torch.testing.assert_close(problem.cross_half.double(), half, **tolerances)
        assert (problem.cross.abs().max() > 0) == (len(before) > 0), f"{place} {name}"


@pytest.mark.parametrize("true_sequential", [False, True])
def test_where_nothing_is_quantized_the_cross_moment_is_zero(true_sequential: bool) -> None:
    spy = Spy(rounds=False)
    quantize(random_model("qwen3"), spy, random_ids(6), true_sequential)
    assert all(problem.cross is not None and not problem.cross.any() for problem in spy.problems)


def test_tokens_of_length_one_are_scaled_in_both_models() -> None:
    model, ids, spy = random_model("llama"), random_ids(5), Spy()
    original = copy.deepcopy(model)
    names = quantize(model, spy, ids, length_one=True)
    name, problem = names[-1], spy.problems[-1]
    before = [other for other in names if other.startswith("0.")]
    x, seen = inputs(original, ids, name), inputs(hybrid(original, model, before), ids, name)
    lengths = seen.norm(dim=1, keepdim=True)
    expected = ((x - seen) / lengths).T @ (seen / lengths) / len(x)
    assert problem.cross is not None
    torch.testing.assert_close(problem.cross.double(), expected, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_changes_no_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, calm, short = random_ids(6), Spy(), Spy()
    quantize(random_model("opt"), calm, ids)
    layer_inputs, calls = CalibrationActivations.layer_inputs, iter(range(1000))

    def runs_out(self: CalibrationActivations, *args: Any) -> dict[str, Tensor]:
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return layer_inputs(self, *args)

    monkeypatch.setattr(CalibrationActivations, "layer_inputs", runs_out)
    memory = Memory()
    quantize(random_model("opt"), short, ids, memory=memory)
    assert memory.steps
    for mine, theirs in zip(short.problems, calm.problems, strict=True):
        assert mine.cross is not None
        assert theirs.cross is not None
        torch.testing.assert_close(mine.cross, theirs.cross, rtol=1e-4, atol=1e-7)


def towards_what_was_lost(self: GPTQ, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
    """Rounds W + W C (H + mean diagonal)^-1: an answer that the cross moment changes."""
    assert problem.cross is not None
    ridge = problem.hessian.diagonal().mean() * torch.eye(len(problem.hessian)).to(problem.hessian)
    weight = problem.weight + problem.weight @ problem.cross @ torch.linalg.inv(problem.hessian + ridge)
    grid = problem.fit_grid(spec, weight)
    return QuantizedLayer(grid.encode(weight), grid)


def test_a_killed_run_ends_with_the_same_bits(
    toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPTQ, "needs_cross", property(lambda _: True))
    monkeypatch.setattr(GPTQ, "solve", towards_what_was_lost)

    def settings(where: str) -> Any:
        return toy_settings("method=gptq", "bits=2", "keep_checkpoint=always", f"results={tmp_path / where}")

    calm, killed = settings("calm"), settings("killed")
    expected = run_cell(calm)
    save = FinishedBlocks.save

    def dies(self: FinishedBlocks, index: int, *rest: Any) -> None:
        if index == 1:
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(FinishedBlocks, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        run_cell(killed)
    monkeypatch.setattr(FinishedBlocks, "save", save)
    assert measured(run_cell(killed)) == measured(expected)
    assert codes(killed) == codes(calm)


def test_a_model_in_half_precision_is_solved_in_float32(toy_settings: ToySettings) -> None:
    """Also the layers that share an input with the one that is solved."""
    row = run_cell(
        toy_settings("method=quantease_paired", "bits=3", "model.dtype=bfloat16", "evaluation.agreement=false")
    )
    assert row["status"] == "done"


def test_inputs_that_show_nothing_of_the_loss_are_refused(
    toy_settings: ToySettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GPTQ, "needs_cross", property(lambda _: True))
    with pytest.raises(InputError, match=r"take calibration\.inputs=quantized"):
        toy_settings("method=gptq", "calibration.inputs=full_precision")


def test_experts_are_refused_before_calibration(
    toy_settings: ToySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the two models they receive other tokens."""
    monkeypatch.setattr(GPTQ, "needs_cross", property(lambda _: True))
    folder = checkpoint("mixtral", tmp_path / "mixtral")
    with pytest.raises(InputError, match=r"gptq pairs .*mlp\.experts\.0\.\S+ in block 0 is one of its experts"):
        preflight(toy_settings("method=gptq", f"model.path={folder}"))

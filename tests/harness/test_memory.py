"""Memory that runs out: step by step less at once, each step recorded, and the same answer."""

import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from baselines.gptq import GPTQ
from baselines.rtn import RTN
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.matmul import add_second_moment
from runners.errors import InputError
from runners.models.activations import BlockActivations
from runners.models.blocks import InMemoryModel, decoder_blocks
from runners.models.memory import Memory, out_of_memory
from runners.quantization import measuring
from tests.conftest import PROJECT
from tests.families import random_ids, random_model
from tests.quantize import quantize

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def quantized(solver: LayerSolver, memory: Memory) -> Any:
    model = random_model("llama")
    quantize(InMemoryModel(model), random_ids(8), 8, solver, GridSpec(3), memory=memory)
    return model


def assert_same_weights(a: Any, b: Any) -> None:
    for mine, theirs in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


FAULTS = """
import resource, sys, torch
from runners.models.memory import configure_malloc
configure_malloc()
torch.set_num_threads(1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1_500_000)
before = faults()
for _ in range(20):
    torch.ones(1_500_000)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc has other settings")
def test_memory_that_a_tensor_leaves_serves_the_next_one() -> None:
    """Tensors of 6 MB, as a forward pass makes: each has 1,465 pages, which are zeroed for the first few of 20 alone."""
    command = [sys.executable, "-c", FAULTS]
    answer = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert int(answer.stdout) < 5 * 1465


def test_what_counts_as_out_of_memory() -> None:
    alloc = (
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
    )
    assert all(out_of_memory(error) for error in (FULL, MemoryError(), RuntimeError(alloc)))
    assert not any(out_of_memory(error) for error in (RuntimeError("shapes differ"), ValueError("out of memory")))


def test_the_allocator_of_this_machine_is_understood() -> None:
    with pytest.raises(Exception, match="memory") as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert out_of_memory(error.value)


def test_batches_are_halved_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    through: Callable[..., torch.Tensor] = BlockActivations._run_block
    sizes: list[int] = []

    def small(self: BlockActivations, index: int, part: torch.Tensor, first: int) -> torch.Tensor:
        sizes.append(len(part))
        if len(part) > 2:
            raise FULL
        return through(self, index, part, first)

    expected = quantized(RTN(), Memory())
    monkeypatch.setattr(BlockActivations, "_run_block", small)
    memory = Memory()
    assert_same_weights(quantized(RTN(), memory), expected)
    assert memory.batch_size == 2
    assert [step.split(": ")[1] for step in memory.steps] == ["batches of 4", "batches of 2"]
    assert "in the calibration of block 0" in memory.steps[0]
    assert sizes[:2] == [8, 4]


def test_hessians_are_made_in_parts_when_batches_of_one_do_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    def large(total: torch.Tensor, x: torch.Tensor, parts: int) -> torch.Tensor:
        if parts < 4:
            raise FULL
        return add_second_moment(total, x, parts)

    expected = quantized(GPTQ(), Memory())
    monkeypatch.setattr(measuring, "add_second_moment", large)
    memory = Memory()
    assert_same_weights(quantized(GPTQ(), memory), expected)
    assert (memory.batch_size, memory.hessian_parts) == (1, 4)
    assert memory.steps[-1].endswith("Hessians in 4 parts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 4, 16])
def test_a_hessian_in_parts_is_the_same(dtype: torch.dtype, parts: int) -> None:
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = add_second_moment(torch.zeros(24, 24), x, parts)
    torch.testing.assert_close(total, add_second_moment(torch.zeros(24, 24), x))
    torch.testing.assert_close(total.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Hungry(LayerSolver):
    """A solver that cannot hold more than eight rows."""

    solver: LayerSolver
    rows: list[int] = field(default_factory=list)

    @property
    def rows_independent(self) -> bool:
        return True

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.rows.append(len(problem.weight))
        if len(problem.weight) > 8:
            raise FULL
        return self.solver.solve(problem, spec)


@pytest.mark.parametrize("solver", [RTN(), GPTQ(), QuantEase(num_iters=4)], ids=str)
def test_layers_are_solved_in_slices_of_rows_with_the_same_answer(solver: LayerSolver) -> None:
    hungry, memory = Hungry(solver), Memory()
    sliced = quantized(hungry, memory)
    assert memory.row_slices >= 8
    assert memory.steps[0] == (
        "in the solver of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj in block 0: layers in 2 slices of rows"
    )
    expected = quantized(solver, Memory())
    first = [decoder_blocks(model)[0].get_parameter("self_attn.q_proj.weight") for model in (sliced, expected)]
    different = torch.ne(*first).float().mean()  # a tie may round the other way, nothing else
    assert different < 0.01


def test_a_method_that_looks_at_all_rows_says_that_memory_ran_out() -> None:
    class Whole(LayerSolver):
        def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
            raise FULL

    with pytest.raises(InputError, match=r"memory ran out in the solver of self_attn\.q_proj in block 0, and nothing"):
        quantized(Whole(), Memory())


def test_other_errors_are_not_tried_again() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Memory().retry("here", fail, Memory().smaller_batches(8))
    assert len(calls) == 1


def test_an_advance_that_is_interrupted_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model("opt"), random_ids(6)
    expected = BlockActivations(InMemoryModel(model), ids, 2)
    expected.advance(0)
    walk = BlockActivations(InMemoryModel(model), ids, 2)
    forward: Callable[..., torch.Tensor] = BlockActivations.forward
    calls: list[int] = []

    def fails_once(self: BlockActivations, index: int, batch: torch.Tensor) -> torch.Tensor:
        calls.append(index)
        if len(calls) == 3:
            raise FULL
        return forward(self, index, batch)

    monkeypatch.setattr(BlockActivations, "forward", fails_once)
    Memory().retry("here", lambda: walk.advance(0), lambda: "a smaller thing")
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(walk.hidden, expected.hidden, strict=True))

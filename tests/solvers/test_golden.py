"""GPTQ against the answers of an implementation by other people, llm-compressor's (see golden/make_gptq.py)."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from baselines.gptq import GPTQ
from quantease.act_order import ActOrder
from quantease.grid import Grid, GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem, QuantizedLayer

GOLDEN = load_file(Path(__file__).parent / "golden" / "gptq.safetensors")
DAMPING = 0.01
SPECS = {
    "bits4": GridSpec(4, scale_bits=32),
    "bits3": GridSpec(3, scale_bits=32),
    "bits4_symmetric": GridSpec(4, symmetric=True, scale_bits=32),
    "bits4_group32": GridSpec(4, group_size=32, scale_bits=32),
    "bits4_actorder": GridSpec(4, scale_bits=32),
    "bits4_group32_actorder": GridSpec(4, group_size=32, scale_bits=32),
}


@dataclass(frozen=True, eq=False)
class ProblemOnGrid(LayerProblem):
    """A layer problem whose grid is given, so that only the solver is compared."""

    grid: UniformGrid = field(kw_only=True)

    def fit_grid(self, spec: GridSpec, weight: Tensor | None = None, like: Grid | None = None) -> UniformGrid:
        return self.grid if self.order is None else self.grid.permuted(self.order)


def golden_grid(case: str) -> UniformGrid:
    """llm-compressor's grid. Its codes, and so its zero points, are signed; ours count from 0."""
    spec, columns = SPECS[case], GOLDEN["weight"].shape[1]
    zero = GOLDEN[f"{case}.zero_point"].float() + 2 ** (spec.bits - 1)
    group = torch.arange(columns) // (spec.group_size or columns)
    return UniformGrid(spec, GOLDEN[f"{case}.scale"].clone(), zero, group)


def solve(case: str, damping: float, act_order: bool, block_size: int = 128) -> QuantizedLayer:
    inputs = GOLDEN["inputs"].float()
    # llm-compressor's Hessian is twice this, divided by the number of batches: its scale cancels out.
    problem = ProblemOnGrid(GOLDEN["weight"].float(), inputs.T @ inputs, grid=golden_grid(case))
    solver = GPTQ(damping=damping, block_size=block_size, static_groups=True)
    return (ActOrder(solver) if act_order else solver).solve(problem, SPECS[case])


@pytest.mark.parametrize("block_size", [128, 50])
@pytest.mark.parametrize("case", SPECS)
def test_gptq_agrees_with_llm_compressor_in_every_entry(case: str, block_size: int) -> None:
    """No entry may differ, ties included: there are none.

    In float64 no value that is rounded comes nearer to the middle between two codes than 4.8e-5 of a step, and in
    float32 these values are off by at most 1.5e-5. A differing code is a whole step, far above the tolerance.
    """
    answer = solve(case, DAMPING, act_order=case.endswith("actorder"), block_size=block_size)
    torch.testing.assert_close(answer.weight, GOLDEN[f"{case}.dequantized"])


@pytest.mark.parametrize("case", SPECS)
def test_the_golden_data_tell_variants_of_gptq_apart(case: str) -> None:
    """Otherwise the agreement would mean little."""
    act_order = case.endswith("actorder")
    for damping, ordered in [(2 * DAMPING, act_order), (DAMPING, not act_order)]:
        answer = solve(case, damping, ordered)
        assert not torch.allclose(answer.weight, GOLDEN[f"{case}.dequantized"])


@pytest.mark.parametrize("case", SPECS)
def test_the_min_max_grid_is_llm_compressors(case: str) -> None:
    """To the last bit, in float32. (Our default rounds the scales to float16, and finds the zero points after that.)"""
    grid, expected = UniformGrid.fit(GOLDEN["weight"].float(), SPECS[case]), golden_grid(case)
    assert torch.equal(grid.scale, expected.scale)
    assert torch.equal(grid.zero, expected.zero)
    assert torch.equal(grid.group, expected.group)

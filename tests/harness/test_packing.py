"""Quantized layers in a file: nothing is lost, and a code takes the bits that it is said to take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baselines.awq import AWQ
from baselines.gptq import GPTQ
from baselines.spqr import SpQR
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerSolver, QuantizedLayer
from quantease.outliers import OutlierQuantEase
from runners.quantization.packing import pack, pack_codes, unpack, unpack_codes
from tests.problems import random_problem

SOLVERS: dict[str, LayerSolver] = {
    "gptq": GPTQ(),
    "refit": QuantEase(num_iters=3, grid_refits=1),
    "outliers": OutlierQuantEase(outlier_ratio=0.05, num_iters=3),
    "structured": OutlierQuantEase(outlier_ratio=0.1, structured=True, num_iters=3),
    "spqr": SpQR(),
    "awq": AWQ(),
}


@given(bits=st.integers(2, 8), rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, derandomize=True)
def test_codes_come_back_and_take_their_bits(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    planes = pack_codes(codes, bits)
    assert planes.nbytes == bits * -(-rows * columns // 8)
    assert torch.equal(unpack_codes(planes, (rows, columns)), codes)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_layer_comes_back_to_the_last_bit(name: str, group_size: int | None) -> None:
    layer = SOLVERS[name].solve(random_problem(24, 64), GridSpec(3, group_size))
    tensors, metadata = pack({"fc1": layer})
    back = unpack(tensors, metadata)["fc1"]
    assert torch.equal(back.weight, layer.weight)
    assert torch.equal(back.codes, layer.codes)
    assert_same_bits(back, layer)


def assert_same_bits(back: QuantizedLayer, layer: QuantizedLayer) -> None:
    assert back.bits_per_weight == layer.bits_per_weight
    assert back.outlier_ratio == layer.outlier_ratio
    assert back.grid.spec == layer.grid.spec

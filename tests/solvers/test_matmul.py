"""Half-precision products with float32 sums lose nothing."""

import itertools

import pytest
import torch

from quantease.matmul import add_second_moment, product, split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_product_of_any_two_half_precision_numbers_is_exact_in_float32(dtype: torch.dtype) -> None:
    """All pairs of significands; exponents only shift them. (Beyond float32's range neither format has products.)"""
    info = torch.finfo(dtype)
    significands = torch.arange(round(1 / info.eps), round(2 / info.eps), dtype=torch.float64) * info.eps
    halves = significands.to(dtype)
    assert torch.equal(halves.double(), significands)
    single = halves.float()[:, None] * halves.float()[None, :]
    assert torch.equal(single.double(), significands[:, None] * significands[None, :])


def second_moment(x: torch.Tensor) -> torch.Tensor:
    return add_second_moment(torch.zeros(x.shape[1], x.shape[1], device=x.device), x)


@pytest.mark.parametrize(("dtype", "device"), list(itertools.product(HALVES, sorted({"cpu", DEVICE}))))
def test_second_moments_of_half_precision_inputs_are_those_of_the_same_numbers_in_float32(
    dtype: torch.dtype, device: str
) -> None:
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    exact = x.double().T @ x.double()
    size = x.double().abs().T @ x.double().abs()
    assert second_moment(x).dtype == torch.float32
    for moment in (second_moment(x), second_moment(x.float())):
        assert ((moment - exact).abs() <= 300 * 2**-24 * size).all()  # the sums are rounded, the products are not
    whole = torch.randint(-8, 9, (300, 40), generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    assert torch.equal(second_moment(whole), (whole.double().T @ whole.double()).float())  # no sum is rounded: equal


def test_two_halves_hold_16_bits() -> None:
    matrix = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    large, small = split(matrix)
    assert ((large.double() + small.double() - matrix.double()).abs() <= 2**-16 * matrix.abs()).all()
    torch.testing.assert_close(product(large, small), large.float() @ small.float())

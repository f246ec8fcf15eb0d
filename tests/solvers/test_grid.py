"""The grid: what it can represent, how it rounds, what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantease.grid import GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.kernels.plain import round_column

SPECS = st.builds(
    GridSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 4, 8, 24]),
    symmetric=st.booleans(),
    scale_bits=st.sampled_from([16, 32]),
)


@settings(max_examples=60, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 1000), size=st.sampled_from([1e-6, 1e-2, 1.0, 1e3]), shift=st.floats(-2, 2))
def test_a_grid_covers_its_weights(spec: GridSpec, seed: int, size: float, shift: float) -> None:
    weight = (torch.randn(5, 24, generator=torch.Generator().manual_seed(seed)) + shift) * size
    grid = UniformGrid.fit(weight, spec)
    codes = grid.encode(weight)
    steps = grid.scale[:, grid.group]
    # Half a step, more at the ends of an asymmetric range (the zero point is rounded) and where float16 is coarse.
    reach = 1.0 if not spec.symmetric else 0.5
    slack = 1e-3 * spec.max_code if size > 1e-4 else spec.max_code
    assert ((grid.decode(codes) - weight).abs() <= steps * (reach + slack)).all()
    assert torch.equal(grid.encode(grid.decode(codes)), codes)
    assert grid.decode(grid.zero[:, grid.group]).eq(0).all()  # zero is always representable
    assert grid.zero.ge(0).all()
    assert grid.zero.le(spec.max_code).all()
    if spec.scale_bits == 16:
        assert torch.equal(grid.scale.half().float(), grid.scale)


@settings(max_examples=40, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 1000))
def test_rounding_a_column_is_encoding_it(spec: GridSpec, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    grid = UniformGrid.fit(torch.randn(7, 24, generator=g), spec)
    values = 2 * torch.randn(7, 24, generator=g)
    columns = grid.columns()[3:20]
    expected = grid.decode(grid.encode(values))
    for column in range(17):
        rounded = round_column(values[:, 3 + column], columns, column)
        assert torch.equal(rounded + 0.0, expected[:, 3 + column] + 0.0)  # + 0.0: no minus zero


def test_values_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0]])
    grid = UniformGrid.fit(weight, GridSpec(2))
    assert grid.scale.item() == 1.0
    assert grid.zero.item() == 1
    assert grid.encode(weight).tolist() == [[0, 1, 1, 3]]  # 0.5 is halfway: to even
    symmetric = UniformGrid.fit(weight, GridSpec(2, symmetric=True))
    assert symmetric.scale.item() == pytest.approx(4 / 3, rel=1e-3)
    assert symmetric.zero.item() == 2
    assert symmetric.encode(weight).tolist() == [[1, 2, 2, 3]]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_mse_search_finds_the_best_of_80_ranges(symmetric: bool) -> None:
    """Against a loop over rows, groups and ranges, each grid written out."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    spec = GridSpec(3, group_size=16, symmetric=symmetric, scale_bits=32, range="mse")
    grid = UniformGrid.fit(weight, spec)
    gains = []
    for row in range(6):
        for group in range(2):
            w = weight[row, 16 * group : 16 * group + 16].double()
            errors = []
            for percent in range(100, 20, -1):
                low, high = float(w.min().clamp(max=0)) * percent / 100, float(w.max().clamp(min=0)) * percent / 100
                if symmetric:
                    low, high = -max(-low, high), max(-low, high)
                scale = (high - low) / 7
                zero = 4 if symmetric else round(-low / scale)
                rounded = scale * ((w / scale).round().add(zero).clamp(0, 7) - zero)
                errors.append((float((rounded - w).abs().pow(2.4).sum()), scale, zero))
            least, scale, zero = min(errors)
            assert grid.scale[row, group].item() == pytest.approx(scale, rel=1e-5)
            assert grid.zero[row, group].item() == zero
            gains.append(1 - least / errors[0][0])
    assert max(gains) > 0.1


def test_each_group_has_its_own_scale() -> None:
    weight = torch.tensor([[0.0, 3.0, 0.0, 30.0]])
    grid = UniformGrid.fit(weight, GridSpec(2, group_size=2))
    assert grid.scale.tolist() == [[1.0, 10.0]]
    assert torch.equal(grid.decode(grid.encode(weight)), weight)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (GridSpec(3), 3 + (16 + 3) / 128),  # one scale and one zero point for 128 columns
        (GridSpec(3, group_size=32), 3 + (16 + 3) / 32),
        (GridSpec(4, group_size=64, symmetric=True), 4 + 16 / 64),  # no zero point is stored
        (GridSpec(2, scale_bits=32), 2 + (32 + 2) / 128),
    ],
)
def test_bits_per_weight_by_hand(spec: GridSpec, expected: float) -> None:
    assert UniformGrid.fit(torch.randn(10, 128), spec).bits_per_weight == pytest.approx(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1},
        {"bits": 9},
        {"bits": 3, "group_size": 0},
        {"bits": 3, "scale_bits": 8},
        {"bits": 3, "range": "best"},
    ],
)
def test_specs_out_of_range_are_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match="must"):
        GridSpec(**wrong)  # pyright: ignore[reportArgumentType]


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="100 does not divide 192"):
        UniformGrid.fit(torch.randn(2, 192), GridSpec(3, group_size=100))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e6])
def test_a_scale_that_float16_cannot_hold_is_refused(value: float) -> None:
    weight = torch.randn(2, 8)
    weight[0, 0] = value
    with pytest.raises(ValueError, match="not finite in float16"):
        UniformGrid.fit(weight, GridSpec(2))

"""SpQR's own mathematics."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.spqr import SpQR
from baselines.spqr_groups import weight_range
from quantease.grid import GridSpec
from quantease.grids.scales import least_error_range
from quantease.grids.uniform import UniformGrid
from quantease.kernels.plain import nearest_values
from tests.problems import random_problem, with_dead_columns


def quantize(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Round-to-nearest between `low` and `high`, Section 3.2's asymmetric quantization, without an integer zero point."""
    step = (high - low) / (2**bits - 1)
    return low + step * torch.round((values - low) / step).clamp(0, 2**bits - 1)


def statistics(values: Tensor) -> Tensor:
    """Scales or zero points of 16 rows, 3 bits each, their own scale and minimum in float16."""
    groups = []
    for group in values.split(16):
        low = group.min().half().to(values)
        step = ((group.max() - group.min()) / 7).half().to(values)
        groups.append(low + step * torch.round((group - low) / step).clamp(0, 7))
    return torch.cat(groups)


def transcription(weight: Tensor, hessian: Tensor, bits: int, threshold: float, group_size: int) -> Tensor:
    """Algorithm 1, one weight matrix column at a time, outlier by outlier; natural order, damping 1."""
    h = hessian.clone()
    h.diagonal().add_(h.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    w = weight.clone()
    rows, columns = w.shape
    limit = threshold * (w.var(dim=0) / factor.diagonal() ** 2).mean()
    for start in range(0, columns, group_size):
        stop = start + group_size
        d = factor.diagonal()[start:stop]
        fitted = w[:, start:stop].clone()
        for row in range(rows):
            v = w[row, start:stop]
            base = ((quantize(v, v.min(), v.max(), bits) - v) / d).square().sum()
            out = []
            for i in range(group_size):
                rest = torch.arange(group_size) != i
                error = ((quantize(v[rest], v[rest].min(), v[rest].max(), bits) - v[rest]) / d[rest]).square().sum()
                out.append(bool(base - error > limit))
            inside = ~torch.tensor(out)
            fitted[row, ~inside] = v[inside].mean()
        low, high = fitted.amin(1), fitted.amax(1)
        scale = (high - low) / (2**bits - 1)
        zero = statistics(-low / scale)
        scale = statistics(scale)
        for j in range(start, stop):
            column = w[:, j].clone()
            code = torch.round(column / scale + zero).clamp(0, 2**bits - 1)
            value = scale * (code - zero)
            is_outlier = ((column - value) / factor[j, j]).square() > limit
            value = torch.where(is_outlier, column, value)
            error = (column - value) / factor[j, j]
            w[:, j] = torch.where(is_outlier, column.half().to(column), value)
            w[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return w


@pytest.mark.parametrize(("bits", "threshold"), [(2, 0.2), (3, 0.2), (4, 0.02)])
def test_it_is_the_papers_algorithm(bits: int, threshold: float) -> None:
    problem = random_problem(32, 64, seed=1)
    weight, hessian = problem.weight.double(), problem.hessian.double()
    expected = transcription(weight, hessian, bits, threshold, 16)
    solver = SpQR(threshold=threshold, act_order=False)
    answer = solver.solve(replace(problem, weight=weight, hessian=hessian), GridSpec(bits))
    assert answer.outliers is not None
    # The two-level statistics are float32 where they are stored: a code in a thousand may fall to the other side.
    assert (answer.weight - expected).abs().gt(1e-3).double().mean() < 5e-3


@pytest.mark.parametrize(
    ("bits", "scale_bits", "zero_bits", "group", "second", "rows", "columns"),
    [(3, 3, 3, 16, 16, 32, 128), (4, 3, 3, 16, 16, 64, 64), (2, 4, 2, 32, 8, 16, 128), (3, 3, 3, 16, 64, 64, 48)],
)
def test_average_bits_by_the_papers_formula(
    bits: int, scale_bits: int, zero_bits: int, group: int, second: int, rows: int, columns: int
) -> None:
    solver = SpQR(group, scale_bits, zero_bits, second, threshold=0.5, act_order=False)
    answer = solver.solve(random_problem(rows, columns), GridSpec(bits))
    formula = bits + (scale_bits + zero_bits) / group + 64 / (group * second) + 32 * answer.outlier_ratio
    assert answer.bits_per_weight == pytest.approx(formula, rel=1e-12)
    ordered = replace(solver, act_order=True).solve(random_problem(rows, columns), GridSpec(bits))
    formula = bits + (scale_bits + zero_bits) / group + 64 / (group * second) + 32 * ordered.outlier_ratio
    assert ordered.bits_per_weight == pytest.approx(
        formula + 16 / rows, rel=1e-12
    )  # the order of the columns is stored


def test_bits_by_hand() -> None:
    """The paper's example: 3-bit codes, scales and zero points, groups of 16 and 16: 3 + 6/16 + 64/256 = 3.625."""
    answer = SpQR(threshold=math.inf, act_order=False).solve(random_problem(32, 128), GridSpec(3))
    assert answer.outliers is None
    assert answer.bits_per_weight == 3.625


@pytest.mark.parametrize("wanted", [0.0, 0.002, 0.01, 0.05])
@pytest.mark.parametrize("spec", [GridSpec(2), GridSpec(3), GridSpec(4)], ids=str)
def test_a_wanted_share_of_outliers_is_hit(spec: GridSpec, wanted: float) -> None:
    answer = SpQR(outlier_ratio=wanted).solve(random_problem(64, 128), spec)
    assert answer.outlier_ratio == pytest.approx(wanted, rel=0.02, abs=1 / (64 * 128))
    assert not answer.notes


def test_a_share_that_cannot_be_hit_is_said() -> None:
    """Inputs that are always zero cost nothing, so none of their weights is an outlier: here three quarters of all."""
    problem = with_dead_columns(random_problem(16, 32), list(range(24)))
    answer = SpQR(outlier_ratio=0.5).solve(problem, GridSpec(3))
    assert 0 < answer.outlier_ratio <= 0.25
    (note,) = answer.notes
    assert note.endswith("outliers instead of 50.000%")


def test_outliers_and_a_second_level_beat_neither() -> None:
    problem = random_problem(64, 128)
    errors = [
        problem.relative_error(SpQR(outlier_ratio=ratio).solve(problem, GridSpec(3)).weight) for ratio in (0, 0.01, 0.1)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_outliers_keep_their_compensated_weight_in_float16() -> None:
    problem = random_problem()
    answer = SpQR(threshold=0.05).solve(problem, GridSpec(3))
    assert answer.outliers is not None
    kept = answer.weight[answer.outliers.rows, answer.outliers.columns]
    torch.testing.assert_close(kept, kept.half().float(), rtol=0, atol=1e-6)


def test_the_runs_group_size_takes_the_place_of_its_own() -> None:
    problem = random_problem()
    assert SpQR().solve(problem, GridSpec(3, group_size=32)).grid.scale.shape == (32, 4)
    assert SpQR().solve(problem, GridSpec(3)).grid.scale.shape == (32, 8)


def test_symmetric_grids_store_no_zero_points() -> None:
    answer = SpQR(threshold=math.inf, act_order=False).solve(random_problem(32, 128), GridSpec(3, symmetric=True))
    assert answer.bits_per_weight == 3 + 3 / 16 + 32 / 256
    assert isinstance(answer.grid, UniformGrid)
    assert answer.grid.zero.eq(4).all()


def test_shrunken_ranges_round_better() -> None:
    """What the search minimizes, on its own: the weights of each group rounded, without any compensation."""
    group = random_problem(64, 16).weight
    whole = weight_range(group, GridSpec(3))
    shrunken = least_error_range(group, 7, lambda part: weight_range(group, GridSpec(3), part))
    errors = [
        (nearest_values(group, scale[:, None], zero[:, None], 7) - group).abs().pow(2.4).sum(1)
        for scale, zero in (whole, shrunken)
    ]
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < 0.9 * errors[0].sum()


def test_raised_damping_is_recorded() -> None:
    problem = random_problem(8, 32)
    shift = torch.linalg.eigvalsh(problem.hessian)[0] + 0.05 * problem.hessian.diagonal().mean()
    indefinite = replace(problem, hessian=problem.hessian - shift * torch.eye(32))
    answer = SpQR(damping=0.01).solve(indefinite, GridSpec(3))
    assert answer.damping_raised
    assert answer.damping == pytest.approx(0.1)
    assert "damping raised from 0.01 to 0.1" in answer.notes
    assert not SpQR().solve(problem, GridSpec(3)).damping_raised


@pytest.mark.parametrize("wrong", [{"group_size": 0}, {"threshold": 0.0}, {"damping": -1.0}, {"outlier_ratio": 1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        SpQR(**wrong)  # pyright: ignore[reportArgumentType]

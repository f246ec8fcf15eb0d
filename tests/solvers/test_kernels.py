"""The fast forms of the pass over a block, held to the plain one: on the CPU, and through Triton's interpreter."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from baselines.gptq import GPTQ
from baselines.spqr import SpQR
from quantease import kernels
from quantease.act_order import ActOrder
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.grids.mxfp4 import MXFP4
from quantease.grids.nf4 import NF4
from quantease.grids.nvfp4 import NVFP4
from quantease.kernels import Columns, cpu, plain
from quantease.layer import LayerSolver
from tests.conftest import missing
from tests.problems import random_problem

Pass = Callable[..., None]
SPECS = [
    GridSpec(2),
    GridSpec(3),
    GridSpec(8, scale_bits=32),
    GridSpec(4, symmetric=True),
    GridSpec(3, group_size=24),
    GridSpec(2, group_size=8, symmetric=True),
    GridSpec(3, group_size=36, range="mse"),
    GridSpec(4, format=NF4()),
    GridSpec(4, group_size=24, format=NF4()),
    GridSpec(4, group_size=16, format=NVFP4()),
    GridSpec(4, group_size=32, format=MXFP4()),
]
FORMS = ["cpu", "cuda"]


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    """Where the tests run with one thread each: the rows of a block are shared out, which has to be tested too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    yield
    torch.set_num_threads(threads)


def on_the_gpu(*arguments: Tensor | Columns | None) -> None:
    """The Triton form: on a GPU where there is one, else by Triton's interpreter (see conftest.py)."""
    from quantease.kernels import cuda

    if not torch.cuda.is_available():
        return cuda.run_block(*arguments)  # pyright: ignore[reportArgumentType]
    there = [_to_gpu(argument) for argument in arguments]
    cuda.run_block(*there)  # pyright: ignore[reportArgumentType]
    for mine, result in zip(arguments[:2], there[:2], strict=True):
        assert isinstance(mine, Tensor)
        assert isinstance(result, Tensor)
        mine.copy_(result)
    return None


def _to_gpu(argument: Tensor | Columns | None) -> Tensor | Columns | None:
    if isinstance(argument, Columns):
        tensors = {name: value.cuda() for name, value in vars(argument).items() if isinstance(value, Tensor)}
        return replace(argument, **tensors)
    return argument if argument is None else argument.cuda()


def form(name: str) -> Pass:
    if name == "cpu":
        return cpu.run_block
    pytest.importorskip("triton", reason=missing("Triton"))
    return on_the_gpu


@pytest.fixture(params=FORMS)
def fast(request: pytest.FixtureRequest) -> Pass:
    return form(request.param)


def block(spec: GridSpec, columns: int = 72, out: int = 37, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Columns]:
    """Values, work and coupling of one block, neither size a multiple of anything, and its grid."""
    if spec.format is not None:
        columns = 96  # their groups are what they are
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=g)
    x = torch.randn(200, columns, generator=g) * torch.logspace(0, -1, columns)
    hessian = x.T @ x / 200
    work = 0.3 * torch.randn(columns, out, generator=g) * hessian.diagonal()[:, None]
    return weight.T.contiguous(), work, hessian, spec.fit(weight).columns()


def same(first: Tensor, second: Tensor) -> None:
    """Equal up to rounding, but for the rows in which a tie fell to the other side."""
    differ = ~torch.isclose(first, second, rtol=1e-4, atol=1e-5)
    assert differ.any(0).float().mean() <= 0.03


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_descent_is_the_plain_one(fast: Pass, spec: GridSpec) -> None:
    values, work, hessian, columns = block(spec)
    curvature = hessian.diagonal().contiguous()
    for grid in (columns, None):  # rounded and relaxed
        mine, changes = values.clone(), work.clone()
        expected, steps = values.clone(), work.clone()
        fast(mine, changes, hessian, grid, curvature, None)
        plain.run_block(expected, steps, hessian, grid, curvature, None)
        same(mine, expected)
        same(changes, steps)
        assert not torch.equal(mine, values)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("keeps", [False, True])
def test_error_feedback_is_the_plain_one(fast: Pass, spec: GridSpec, keeps: bool) -> None:
    values, _, hessian, columns = block(spec)
    coupling = -hessian / hessian.diagonal()[:, None]
    step = 1.0 if columns.levels is None else columns.levels.diff().median().item()  # in units of the scale
    limit = 0.05 * (step * columns.scale[columns.group.long()].mean(1)).square() if keeps else None
    results = []
    for run in (fast, plain.run_block):
        mine, changes = torch.full_like(values, torch.nan), values.clone()  # the present values are not looked at
        run(mine, changes, coupling, columns, None, limit)
        results.append((mine, changes))
    for mine, expected in zip(*results, strict=True):
        assert torch.isfinite(mine).all()
        same(mine, expected)
    assert keeps == (results[0][1] == 0).float().mean().gt(0.1)


def test_fractional_zero_points_and_scattered_groups(fast: Pass) -> None:
    values, work, hessian, columns = block(GridSpec(3, group_size=24))
    g = torch.Generator().manual_seed(1)
    columns = replace(
        columns,
        zero=columns.zero + torch.rand(columns.zero.shape, generator=g) - 0.5,
        group=columns.group[torch.randperm(72, generator=g)],
    )
    results = []
    for run in (fast, plain.run_block):
        mine, changes = values.clone(), work.clone()
        run(mine, changes, hessian, columns, hessian.diagonal().contiguous(), None)
        results.append(mine)
    same(*results)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (33, 16), (64, 17), (96, 65)])
def test_blocks_of_any_size(fast: Pass, size: tuple[int, int]) -> None:
    """One row, one column, whole strips and parts of them; the block is a part of larger matrices."""
    values, work, hessian, columns = block(GridSpec(4), 100, 70)
    part, rows = slice(2, 2 + size[0]), size[1]
    columns = replace(columns, scale=columns.scale[:, :rows].contiguous(), zero=columns.zero[:, :rows].contiguous())
    values, work = values[:, :rows].contiguous(), work[:, :rows].contiguous()
    results = []
    for run in (fast, plain.run_block):
        mine, changes = values.clone(), work.clone()
        curvature = hessian.diagonal().contiguous()[part]
        run(mine[part], changes[part], hessian[part, part], columns[part], curvature, None)
        assert torch.equal(mine[:2], values[:2])  # nothing else is touched
        assert torch.equal(mine[part.stop :], values[part.stop :])
        results.append(mine)
    same(*results)


SOLVERS = [QuantEase(6), QuantEase(6, init=GPTQ()), GPTQ(), ActOrder(GPTQ()), SpQR(threshold=0.1)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(2, group_size=32)], ids=str)
def test_a_solver_gives_the_same_answer_with_every_form(
    name: str, solver: LayerSolver, spec: GridSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = random_problem(24, 96, seed=2)
    errors = []
    for run in (form(name), plain.run_block):
        monkeypatch.setattr(kernels, "_form", lambda _values, run=run: run)
        errors.append(problem.relative_error(solver.solve(problem, spec).weight))
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)  # ties


def test_the_cpu_takes_its_form_and_other_precisions_the_plain_one() -> None:
    assert kernels._form(torch.zeros(1)) is cpu.run_block
    assert kernels._form(torch.zeros(1, dtype=torch.float64)) is plain.run_block

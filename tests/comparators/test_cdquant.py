"""CDQuant's own mathematics."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from baselines.cdquant import CDQuant
from baselines.rtn import RTN
from quantease.grid import Grid, GridSpec
from quantease.grids.mxfp4 import MXFP4
from quantease.grids.nf4 import NF4
from quantease.layer import LayerProblem
from tests.problems import in_double, random_problem

SPECS = [GridSpec(3), GridSpec(2, group_size=12), GridSpec(3, symmetric=True)]
LEVELS = [GridSpec(4, group_size=32, format=NF4()), GridSpec(4, group_size=32, format=MXFP4())]


def losses_of_all_moves(problem: LayerProblem, grid: Grid, codes: Tensor, row: int) -> Tensor:
    """(in, levels): the loss of a row, from its definition, after each of its weights is moved to each level."""
    one, columns, levels = grid.of_rows(slice(row, row + 1)), torch.arange(codes.shape[1]), grid.spec.max_code + 1
    values = torch.cat([one.decode(torch.full_like(codes[:1], code)) for code in range(levels)])  # (levels, in)
    moved = one.decode(codes[row : row + 1]).repeat(len(columns), levels, 1)  # (in, levels, in)
    moved[columns, :, columns] = values.T
    difference = (moved - problem.weight[row]).double()
    return ((difference @ problem.hessian.double()) * difference).sum(-1)


def greedy(problem: LayerProblem, grid: Grid, limit: int) -> Tensor:
    """The codes after at most `limit` of the best moves of each row, found by trying all."""
    codes = grid.encode(problem.weight)
    for row in range(len(codes)):
        for _ in range(limit):
            losses = losses_of_all_moves(problem, grid, codes, row)
            best = int(losses.argmin())
            column, code = divmod(best, losses.shape[1])
            if losses[column, code] >= losses[column, int(codes[row, column])] * (1 - 1e-12):
                break
            codes[row, column] = code
    return codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("limit", [3, 100])
def test_every_step_is_the_best_of_all_moves(spec: GridSpec, limit: int) -> None:
    problem = in_double(random_problem(3, 24))
    answer = CDQuant(limit / 24).solve(problem, spec)
    assert torch.equal(answer.codes, greedy(problem, answer.grid, limit))


@pytest.mark.parametrize("spec", [*SPECS[:1], *LEVELS], ids=str)
def test_at_the_end_no_move_lowers_the_loss_of_a_row(spec: GridSpec) -> None:
    problem = random_problem(3, 64)
    answer = CDQuant().solve(problem, spec)
    for row in range(3):
        losses = losses_of_all_moves(problem, answer.grid, answer.codes, row)
        reached = losses[0, int(answer.codes[row, 0])]
        assert losses.min() >= reached * (1 - 1e-5)


def test_more_moves_never_raise_the_loss_of_a_row() -> None:
    problem = random_problem()
    errors = []
    for moves in (1, 4, 16, 64, 512):
        difference = CDQuant(moves / 128).solve(problem, GridSpec(3)).weight - problem.weight
        errors.append(((difference @ problem.hessian) * difference).sum(1))
    assert all((later <= earlier * (1 + 1e-5)).all() for earlier, later in pairwise(errors))
    assert (errors[-1] < errors[0]).all()


def test_the_number_of_moves_is_bounded() -> None:
    problem = random_problem()
    moved = CDQuant(40 / 128).solve(problem, GridSpec(3)).codes != RTN().solve(problem, GridSpec(3)).codes
    assert 1 <= int(moved.sum(1).max()) <= 40


@pytest.mark.parametrize("spec", [GridSpec(3, group_size=32), LEVELS[0]], ids=str)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_answer(spec: GridSpec) -> None:
    problem = random_problem()
    there = LayerProblem(problem.weight.cuda(), problem.hessian.cuda())
    codes = CDQuant().solve(there, spec).codes.cpu()
    assert (codes != CDQuant().solve(problem, spec).codes).float().mean() < 0.01


def test_no_moves_are_refused() -> None:
    with pytest.raises(ValueError, match="moves_per_column must be positive"):
        CDQuant(0.0)

"""The corrected target: QEP, and the share that two halves of the calibration data agree on."""

from dataclasses import dataclass, replace

import pytest
import torch

from baselines.awq import AWQ
from baselines.gptaq import GPTAQ
from baselines.gptq import GPTQ
from baselines.qep import CorrectedTarget, sound_share
from baselines.rtn import RTN
from quantease.coordinate_descent import QuantEase
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from runners.config.command_line import check
from runners.errors import InputError
from tests.comparators.lossy import Lossy, corrected, lossy

SPEC = GridSpec(4)


@dataclass(frozen=True)
class Witness(LayerSolver):
    """Rounds to nearest, and keeps the problems that it is given."""

    seen: list[LayerProblem]

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        self.seen.append(problem)
        return RTN().solve(problem, spec)


def target(problem: LayerProblem, share: float | None, damping: float = 1.0) -> LayerProblem:
    """The problem that the wrapped method is given."""
    witness = Witness([])
    CorrectedTarget(witness, share, damping).solve(problem, SPEC)
    return witness.seen[0]


@pytest.mark.parametrize(("share", "damping"), [(0.5, 1.0), (1.0, 0.01), (0.0, 0.0)])
def test_the_wrapped_method_is_given_the_corrected_weight(share: float, damping: float) -> None:
    problem = lossy(16, 64).double
    assert problem.cross is not None
    given = target(problem, share, damping)
    torch.testing.assert_close(given.weight, corrected(problem, problem.cross, share, damping))
    assert given.cross is None
    assert torch.equal(given.hessian, problem.hessian)


def test_the_whole_correction_is_the_best_weight_there_is() -> None:
    layer = lossy(16, 64)
    best = torch.linalg.lstsq(layer.left.double(), layer.full.double() @ layer.weight.double().T).solution.T
    torch.testing.assert_close(target(layer.double, 1.0, 0.0).weight, best)


def test_layers_that_share_an_input_are_corrected_alike() -> None:
    """AWQ's columns have one scale for all of them, whichever layer is solved."""
    one, other = lossy(16, 64), lossy(24, 64, seed=1).weight
    problem = replace(one.problem, siblings=(other,))
    mirrored = replace(one.problem, weight=other, siblings=(one.weight,))
    assert torch.equal(target(problem, None).siblings[0], target(mirrored, None).weight)
    scales = [CorrectedTarget(AWQ(), None).solve(side, SPEC).column_scale for side in (problem, mirrored)]
    assert scales[0] is not None
    torch.testing.assert_close(scales[0], scales[1])


def share_of(layer: Lossy) -> float:
    (note,) = CorrectedTarget(RTN(), None).solve(layer.problem, SPEC).notes
    assert note.startswith("share of the correction ")
    return float(note.split()[-1])


def test_the_share_is_that_of_the_equation() -> None:
    layer = lossy(16, 64, tokens=256)
    problem = layer.double
    assert problem.cross is not None
    assert problem.cross_half is not None
    h = problem.hessian
    one, other = (
        corrected(problem, part, 1.0, 1.0) - problem.weight
        for part in (problem.cross_half, problem.cross - problem.cross_half)
    )
    whole = corrected(problem, problem.cross, 1.0, 1.0) - problem.weight
    share = 4 * ((one @ h) * other).sum() / ((whole @ h) * whole).sum()
    assert 0.2 < share < 0.9
    assert share_of(layer) == pytest.approx(share.item(), abs=1e-3)
    expected = problem.weight + share * whole
    torch.testing.assert_close(target(problem, None).weight, expected)


def test_the_share_grows_with_the_tokens_and_with_the_loss_that_is_no_noise() -> None:
    few, many = (share_of(lossy(16, 64, seed=2, noise=0.1, tokens=tokens)) for tokens in (96, 4096))
    assert few < 0.6
    assert many > 0.9
    layer = lossy(16, 64, seed=2)
    assert share_of(replace(layer, left=layer.full * 0.5)) == pytest.approx(1.0, abs=0.1)  # nothing but shrinkage
    assert share_of(replace(layer, left=layer.full)) == 0.0


def test_it_is_nearly_the_share_that_is_best_on_other_tokens() -> None:
    found, best = [], []
    for seed in range(4):
        layer = lossy(32, 64, seed, noise=0.2, tokens=256 + 4096)
        seen, unseen = (
            Lossy(layer.weight, layer.full[part], layer.left[part]) for part in (slice(256), slice(256, None))
        )
        found.append(unseen.error(target(seen.problem, None).weight))
        best.append(min(unseen.error(target(seen.problem, share / 20).weight) for share in range(21)))
    assert sum(found) < 1.02 * sum(best)


def test_halves_that_disagree_correct_nothing_and_equal_ones_all() -> None:
    eye = torch.eye(4)
    one = torch.ones(2, 4)
    assert sound_share(one, -0.5 * one, eye) == 0.0
    assert sound_share(one, one, eye) == 1.0
    assert sound_share(one, torch.zeros(2, 4), eye) == 0.0
    assert sound_share(torch.zeros(2, 4), torch.zeros(2, 4), eye) == 0.0


def test_without_the_half_there_is_no_share() -> None:
    problem = replace(lossy(8, 16).problem, cross_half=None)
    with pytest.raises(ValueError, match="share=null needs"):
        CorrectedTarget(RTN(), None).solve(problem, SPEC)


def test_damping_of_the_correction_is_raised_and_recorded() -> None:
    problem = lossy(8, 64, tokens=16).problem
    answer = CorrectedTarget(RTN(), 0.5, damping=0.0).solve(problem, SPEC)
    assert answer.damping_raised
    (note,) = answer.notes
    assert note.startswith("damping raised from 0 to ")
    assert note.endswith(" in the correction")
    assert not CorrectedTarget(RTN()).solve(problem, SPEC).damping_raised


@pytest.mark.parametrize("solver", [GPTAQ(), QuantEase(init=GPTAQ()), CorrectedTarget(GPTQ())], ids=repr)
def test_losses_are_not_made_up_for_twice(solver: LayerSolver) -> None:
    with pytest.raises(ValueError, match="would count twice"):
        CorrectedTarget(solver)


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"share": -0.1}, {"damping": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        CorrectedTarget(RTN(), **wrong)


def test_any_method_is_wrapped_by_its_name() -> None:
    (named,) = check(["method=qep_gptq", "method.solver=quantease", "method.name=qep_quantease"], multirun=False)
    (composed,) = check(["method=qep_quantease"], multirun=False)
    assert named == composed
    cells = check(["method=qep_gptq", "method.solver=awq,gptq_quantease"], multirun=True)
    solvers = [getattr(cell.run.method.solver, "solver", None) for cell in cells]
    assert solvers == [AWQ(), QuantEase(init=GPTQ())]
    assert cells[0].digest != cells[1].digest
    (nested,) = check(["method=qep_quantease", "method.solver.init=gptq"], multirun=False)
    assert getattr(nested.run.method.solver, "solver", None) == QuantEase(init=GPTQ())


REFUSALS = {
    "method.solver=gtpq": "there is no method gtpq for method.solver: did you mean gptq?",
    "method.solver=fp16": "method.solver=fp16: fp16 does not quantize, so there is nothing to wrap",
    "method.solver=gptaq": "method.solver must not be a method that makes up for lost inputs itself",
    "method.share=2": "method.share must lie in 0 to 1, or be null, not 2",
}


@pytest.mark.parametrize(("words", "sentence"), REFUSALS.items())
def test_what_cannot_be_wrapped_gets_a_sentence(words: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence.replace("?", r"\?")):
        check(["method=qep_gptq", words], multirun=False)

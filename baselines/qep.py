"""QEP (Arai and Ichikawa, 2025, https://arxiv.org/abs/2504.09629): a target that makes up for what the inputs have lost.

The layer is to give W X, the outputs in the unquantized model, on the inputs X^ that the quantized blocks before it leave.
With H = X^ X^^T and the cross moment C = (X - X^) X^^T, the best weights without a grid are W + W C H^-1. Any method
then approximates

    W* = W + share D,    D = W C (H + l mean(diag H) I)^-1,

on the inputs X^, as ||W X - W^ X^||^2 = ||(W* - W^) X^||^2 + a constant, for share = 1 and l = 0.

**The share.** QEP takes one half. D is measured on few tokens, so part of it is noise. CoreQ (2026,
https://arxiv.org/abs/2602.05902) finds the share of a layer in closed form. Ours is derived: least squares against the
correction without noise, D_0, wants share = <D, D_0>_H / <D, D>_H with <A, B>_H = tr(A H B^T). The calibration data fall
in two halves, every second sequence and the others, whose corrections D_a and D_b sum to D. Their noise is independent, so
<D_a, D_b>_H is a quarter of <D, D_0>_H on average:

    share = 4 <D_a, D_b>_H / <D, D>_H,    clamped to 0 to 1.

(The share that suits one half alone, 2 <D_a, D_b>_H / (<D_a, D_a>_H + <D_b, D_b>_H), is too small for both.)
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.cholesky import damping_notes, inverse_factor
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


@dataclass(frozen=True)
class CorrectedTarget(LayerSolver):
    """Any method, with W* as the weight that it is to approximate; without a cross moment it is that method itself.

    Grids are fitted to W* as well. The objective that a method tracks is towards W*; the errors that a run reports are
    towards W, and so may be larger than without the correction. The authors' code leaves down_proj as it is; here all
    layers are corrected alike, as a layer problem has no name.

    Attributes:
        solver: the method. It must not look at the cross moment itself.
        share: of the correction D; None: from the two halves of the calibration data, for each layer. Then the rows of
            a layer are not independent, and the answer's notes name the share.
        damping: l, as a fraction of the mean Hessian diagonal; raised, and recorded, where the factorization fails.
    """

    solver: LayerSolver
    share: float | None = 0.5
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.share is not None and not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in 0 to 1, or be null, not {self.share}")
        if self.damping < 0:
            raise ValueError(f"damping must not be negative, not {self.damping}")
        if self.solver.needs_cross:
            raise ValueError("solver must not be a method that makes up for lost inputs itself: they would count twice")

    @property
    def rows_independent(self) -> bool:
        return self.share is not None and self.solver.rows_independent

    @property
    def needs_cross(self) -> bool:
        return True

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        if problem.cross is None:
            return self.solver.solve(problem, spec)
        factor, damping = inverse_factor(problem, self.damping)
        weight, share = self._corrected(problem.weight, problem, factor)
        siblings = tuple(self._corrected(sibling, problem, factor)[0] for sibling in problem.siblings)
        plain = replace(problem, weight=weight, siblings=siblings, cross=None, cross_half=None)
        answer = self.solver.solve(plain, spec)
        raised = damping_notes(self.damping, damping)
        notes = tuple(f"{note} in the correction" for note in raised)
        notes += () if self.share is not None else (f"share of the correction {share:.3f}",)
        raised_at_all = answer.damping_raised or bool(raised)
        return replace(answer, notes=answer.notes + notes, damping_raised=raised_at_all)

    def _corrected(self, weight: Tensor, problem: LayerProblem, factor: Tensor) -> tuple[Tensor, float]:
        """W* (out, in) of one of the layers that share the input, and the share of the correction that it took."""
        assert problem.cross is not None
        if self.share is not None:
            return weight + self.share * _correction(weight, problem.cross, problem, factor), self.share
        if problem.cross_half is None:
            raise ValueError("share=null needs the cross moment of one half of the calibration data, cross_half")
        one = _correction(weight, problem.cross_half, problem, factor)
        other = _correction(weight, problem.cross - problem.cross_half, problem, factor)
        share = sound_share(one, other, problem.hessian)
        return weight + share * (one + other), share


def _correction(weight: Tensor, cross: Tensor, problem: LayerProblem, factor: Tensor) -> Tensor:
    """W C (H + l I)^-1 (out, in), with H^-1 = U^T U for the factor U; zero for dead inputs."""
    alive = problem.hessian.diagonal() > 0
    return ((weight @ cross).mul_(alive) @ factor.mT) @ factor


def sound_share(one: Tensor, other: Tensor, hessian: Tensor) -> float:
    """The share of the correction `one` + `other` (out, in) that is not noise, given its parts from two halves of the data.

    0 where there is nothing to correct.
    """
    both = one + other
    energy = _inner(both @ hessian, both)
    return min(1.0, max(0.0, 4 * _inner(one @ hessian, other) / energy)) if energy > 0 else 0.0


def _inner(one: Tensor, other: Tensor) -> float:
    return (one * other).sum(dtype=torch.float64).item()  # as many terms as weights

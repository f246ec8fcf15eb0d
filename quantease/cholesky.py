"""The factor of the inverse Hessian with which GPTQ and its descendants compensate for rounding errors.

After column j is rounded with the error e, the best change of the columns that remain is -e / [H^-1]_jj [H^-1]_j,: where
H is the Hessian of the remaining columns alone (optimal brain surgeon; GPTQ, https://arxiv.org/abs/2210.17323, equations
2 and 3). For columns in a fixed order, row j of the upper Cholesky factor U of the inverse of the whole Hessian,
H^-1 = U^T U, is that row for each j, divided by the square root of its first entry (Section 3, step 3). So one
factorization takes the place of an inverse per column, and is much more accurate in float32.
"""

import torch
from torch import Tensor

from quantease.layer import LayerProblem, Unsupported

LARGEST_DAMPING = 100.0  # times the mean diagonal: nothing is left of the Hessian long before that
SMALLEST_RAISED = 1e-4  # what a damping of zero is raised to: less is lost in float32, where 2^-24 is 6e-8


def inverse_factor(problem: LayerProblem, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor (in, in) of the inverse of the damped Hessian, and the damping that it took.

    Args:
        damping: fraction of the mean diagonal (of the inputs that are not dead) that is added to the diagonal, as in
            GPTQ, Section 3, step 3. Where the factorization fails it is raised tenfold until it succeeds; callers record
            this with `damping_notes`.

    Raises:
        Unsupported: no damping helps.
    """
    diagonal = problem.hessian.diagonal()
    alive = diagonal > 0
    # The mean is taken over inputs that are not dead, and is 1 where all are: with dead inputs in it, damping would mean
    # something else in a layer that has many. It stays a tensor, for which the host need not wait.
    mean = torch.where(alive.any(), diagonal.sum() / alive.sum().clamp(min=1), 1.0)
    # A dead input is uncoupled from all others: with any positive curvature its weights are rounded to nearest. The mean
    # keeps the factor's condition, and the independence of the Hessian's scale.
    diagonal = torch.where(alive, diagonal, mean)
    while damping <= LARGEST_DAMPING:
        factor = _factor(problem.hessian, diagonal + damping * mean)
        if factor is not None:
            return factor, damping
        damping = max(10 * damping, SMALLEST_RAISED)
    raise Unsupported(f"the Hessian cannot be factorized, even with damping {LARGEST_DAMPING:g}: is it finite?")


def _factor(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    """The factor (in, in) for the Hessian with this diagonal, or None where it does not exist in this precision.

    The inverse is made from the Cholesky factor of H, which fails exactly where H is not positive definite, and then
    factored itself. `cholesky_ex` reports a failure instead of raising.
    """
    hessian = hessian.clone()
    hessian.diagonal().copy_(diagonal)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    del hessian  # four matrices of this size would not fit beside a large layer
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper  # NaN passes as a success


def damping_notes(asked: float, used: float) -> tuple[str, ...]:
    """The note that says that the damping was raised, if it was."""
    return () if used == asked else (f"damping raised from {asked:g} to {used:g}",)

"""The factor of the inverse Hessian that GPTQ and its descendants compensate their rounding errors with."""

import torch
from torch import Tensor

from quantease.layer import LayerProblem, Unsupported

LARGEST_DAMPING = 100.0  # times the mean diagonal: nothing is left of the Hessian long before that


def inverse_factor(problem: LayerProblem, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor (in, in) of the inverse of the damped Hessian, and the damping that it took.

    Args:
        damping: fraction of the mean diagonal (of the inputs that are not always zero) that is added to the diagonal.
            Where the factorization fails it is raised tenfold until it succeeds; it is for the caller to say so.

    Raises:
        Unsupported: no damping helps.
    """
    diagonal = problem.hessian.diagonal()
    alive = diagonal > 0
    mean = torch.where(alive.any(), diagonal.sum() / alive.sum().clamp(min=1), 1.0)  # of the inputs that are ever used
    diagonal = torch.where(alive, diagonal, mean)  # the weights of the others are only rounded
    while damping <= LARGEST_DAMPING:
        factor = _factor(problem.hessian, diagonal + damping * mean)
        if factor is not None:
            return factor, damping
        damping = max(10 * damping, 1e-4)
    raise Unsupported(f"the Hessian cannot be factorized, even with damping {LARGEST_DAMPING:g}: is it finite?")


def _factor(hessian: Tensor, diagonal: Tensor) -> Tensor | None:
    """The factor for the Hessian with this diagonal, or None where there is none in the precision at hand."""
    hessian = hessian.clone()
    hessian.diagonal().copy_(diagonal)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    del hessian  # four matrices of this size would not fit beside a large layer
    if failed:
        return None
    inverse = torch.cholesky_inverse(lower)
    del lower
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper


def damping_notes(asked: float, used: float) -> tuple[str, ...]:
    """The note that says that the damping was raised, if it was."""
    return () if used == asked else (f"damping raised from {asked:g} to {used:g}",)

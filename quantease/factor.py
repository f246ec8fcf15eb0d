"""The factor of the inverse Hessian that GPTQ and its descendants compensate their rounding errors with."""

import torch
from torch import Tensor

from quantease.layer import Unsupported, revive_dead_columns

LARGEST_DAMPING = 100.0  # times the mean diagonal: nothing is left of the Hessian long before that


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float]:
    """The upper Cholesky factor of the inverse of the damped Hessian, and the damping that it took.

    Args:
        damping: fraction of the mean diagonal that is added to the diagonal. Where the factorization fails it is raised
            tenfold until it succeeds; it is for the caller to say so.

    Raises:
        Unsupported: no damping helps.
    """
    hessian = revive_dead_columns(hessian)
    mean, diagonal = hessian.diagonal().mean(), hessian.diagonal().clone()
    while damping <= LARGEST_DAMPING:
        hessian.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper, damping
        damping = max(10 * damping, 1e-4)
    raise Unsupported(f"the Hessian cannot be factorized, even with damping {LARGEST_DAMPING:g}: is it finite?")


def raised(asked: float, used: float) -> tuple[str, ...]:
    """The note that says that the damping was raised, if it was."""
    return () if used == asked else (f"damping raised from {asked:g} to {used:g}",)

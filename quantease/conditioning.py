"""What a Hessian cannot say: the weights of inputs too small to be seen, and of inputs that follow from the others.

Coordinate descent has no damping. Where the calibration inputs leave a direction of the weights undetermined, the sweeps
move along it freely, and inputs that do go that way meet codes that mean nothing. Both cases are seen here, on tensors
alone, and what is done about them is recorded with the layer.
"""

import torch
from torch import Tensor

# An input is faint if its diagonal entry is below this times the mean diagonal. 2^-24 is the rounding unit of float32:
# were all inputs but one that faint, the float32 sum of the layer's squared output would not change by leaving them
# out. Such an input is at most 2^-12 of the others in size. Its (D H)_j / H_jj divides the rounding errors of the large
# inputs by its own small entry, so its code says nothing.
FAINT = 2.0**-24
# Inputs that follow from the ones before them, in relative variance. Random rounding errors of float32 move the
# eigenvalues of the correlation matrix by about sqrt(n) 2^-24; this ridge, raised tenfold where they move further, keeps
# the factorization possible, and a pivot within thirty ridges of zero is taken for zero. (The pivots of dependent inputs
# are a small multiple of the ridge, the larger the fewer of them there are.)
ROUNDING = 2.0**-24
NEAR_ZERO = 30
# The share of the inputs that must follow from the others. A layer norm without bias takes one direction away and equal
# inputs a few, on all texts alike: they do no harm, and leave the published method as it is. Too few tokens take many.
DEFICIENT = 1 / 8


def faint_inputs(hessian: Tensor) -> Tensor:
    """The mask (in,) of the inputs that are not zero, but too small beside the others to be seen in float32."""
    diagonal = hessian.diagonal()
    return (diagonal > 0) & (diagonal < FAINT * diagonal.mean())


def dependent_inputs(hessian: Tensor) -> int:
    """How many inputs are linear functions of those before them, as far as float32 can tell; dead inputs are not.

    The pivots of the Cholesky factor are the part of each input's variance that the inputs before it leave unexplained.
    It costs as much as a fraction of a sweep, and one wait for the device.
    """
    diagonal = hessian.diagonal()
    # Of the correlations, as the sizes of the inputs say nothing about their rank, and descent does not depend on them.
    inverse_size = torch.where(diagonal > 0, diagonal.clamp(min=torch.finfo(diagonal.dtype).tiny).rsqrt(), 0.0)
    ridge = ROUNDING * len(hessian) ** 0.5
    while ridge < 1:
        correlation = (hessian * inverse_size).mul_(inverse_size[:, None])
        correlation.diagonal().fill_(1 + ridge)
        failed = torch.empty((), dtype=torch.int32, device=hessian.device)
        # In place, which the layout of columns allows: a second matrix of this size may not fit beside a large layer.
        torch.linalg.cholesky_ex(correlation.mT, out=(correlation.mT, failed))
        if not failed:
            return int((correlation.diagonal().square() < NEAR_ZERO * ridge).sum())
        ridge *= 10
    return 0  # not finite: nothing can be said


def damp_rank_deficient(hessian: Tensor) -> tuple[Tensor, float | None, tuple[str, ...]]:
    """The Hessian, the damping that it was given and the note that says so: none and no note where its rank is not low.

    The damping, as a fraction of the mean diagonal, is n / rank for n inputs. With fewer independent tokens than inputs,
    that is the ratio of the sampling error of the second moment to its size (Ledoit and Wolf, 2004, for inputs of equal
    size), so the fewer tokens, the nearer the answer is to rounding to nearest, which is the best without any.
    Dead inputs keep their zeros.
    """
    dependent = dependent_inputs(hessian)
    diagonal = hessian.diagonal()
    alive = diagonal > 0
    count = int(alive.sum())
    if dependent <= DEFICIENT * count:
        return hessian, None, ()
    damping = count / max(1, count - dependent)
    hessian = hessian.clone()
    hessian.diagonal().add_(alive * (damping * diagonal.sum() / count))
    note = f"rank-deficient Hessian: {dependent} of {count} inputs follow from the others, damping raised from 0 to "
    return hessian, damping, (f"{note}{damping:.3g}",)

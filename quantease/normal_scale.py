"""Layers of unusual scale are solved at a usual one: a power of two per layer, stored with it.

Scales, outliers and SpQR's second level are float16, whose numbers lose bits below 2^-14 and end at 65,504. A layer whose
largest weight is far from 1 is multiplied by the power of two that brings it there, solved, and multiplied back: exact in
binary floating point, so c W has c times the answer of W for every power of two c.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, QuantizedLayer

# Largest weights that are left as they are: trained layers have 0.05 to 10. Down here an 8-bit scale is 2^-14, float16's
# smallest normal number.
LOWEST, HIGHEST = 2.0**-7, 2.0**7
LARGEST_EXPONENT = 126  # either way: 2^126 and 2^-126 are normal float32 numbers

Solve = TypeVar("Solve", bound=Callable[..., QuantizedLayer])


def unusual_exponent(weight: Tensor) -> int:
    """The e for which the largest of the weights is 0.5 to 1 times 2^e; 0 where it is of usual size (or not finite)."""
    low, high = weight.aminmax()  # NaN where any weight is
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest) or largest == 0 or LOWEST <= largest < HIGHEST:
        return 0
    return max(-LARGEST_EXPONENT, min(math.frexp(largest)[1], LARGEST_EXPONENT))


def at_normal_scale(solve: Solve) -> Solve:
    """The method `solve`, which sees layers of unusual scale multiplied by a power of two; the answer undoes it."""

    @wraps(solve)
    def solve_scaled(self: Any, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        exponent = unusual_exponent(problem.weight)
        if exponent == 0:
            return solve(self, problem, spec)
        factor = 2.0**-exponent
        siblings = tuple(weight * factor for weight in problem.siblings)  # errors of one group stay comparable
        answer = solve(self, replace(problem, weight=problem.weight * factor, siblings=siblings), spec)
        return replace(answer, exponent=answer.exponent + exponent)

    return cast(Solve, solve_scaled)

"""Incoherence processing (QuIP, Chee et al., 2023, https://arxiv.org/abs/2307.13304, Section 4 and Algorithm 1).

    s = (diag H / diag W^T W)^(1/4),  W <- U (W s) V^T,  H <- V (H / s s^T) V^T

so that no entry of the weight and no direction of the Hessian is much larger than the others; undone in the answer. As in
QuIP#, U and V are Hadamard matrices with random signs, and not products of two random orthogonal matrices: a seed and s are
stored (`quantease.grids.rotation`).

A grid group holds neighboring columns of the rotated weight. AWQ has no place here, as its scales follow from inputs that
the rotation mixes.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.grids.rotation import Rotation
from quantease.grids.scale_formats import FP16
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer

LARGEST = 2.0**10  # of s and 1 / s, relative to their geometric mean: far inside float16


@dataclass(frozen=True)
class Incoherence:
    """Both sides of the weight rotated, and its columns scaled.

    Attributes:
        seed: of the signs; layers of equal shape have equal signs.
        scales: scale the columns by s; otherwise s is 1.
    """

    seed: int = 0
    scales: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be 0 to 2^32 - 1, not {self.seed}")

    @property
    def name(self) -> str:
        return "incoherence"

    @property
    def mixes_rows(self) -> bool:
        return True

    def solve(self, solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        rotation = Rotation(self.seed, self._scale(problem))
        crosses = (problem.cross, problem.cross_half)
        cross, half = (None if moment is None else rotation.of_moment(moment) for moment in crosses)
        rotated = LayerProblem(
            rotation.of_weight(problem.weight), rotation.of_moment(problem.hessian), cross=cross, cross_half=half
        )
        return replace(solver.solve(rotated, spec), rotation=rotation)

    def _scale(self, problem: LayerProblem) -> Tensor:
        """s (in,), as it is stored; 1 for columns of which nothing is known, dead inputs or zero weights."""
        diagonal = problem.hessian.diagonal()
        if not self.scales:
            return torch.ones_like(diagonal)
        largest = problem.weight.abs().amax()  # first divided by it, as the squares of very small weights are zero
        sizes = (problem.weight / torch.where(largest > 0, largest, 1)).square().sum(0)
        known = (diagonal > 0) & (sizes > 0)
        logarithms = torch.where(known, (diagonal / sizes).log() / 4, 0.0)
        logarithms = logarithms - logarithms.sum() / known.sum().clamp(min=1)  # relative to their geometric mean
        bound = math.log(LARGEST)
        return FP16.storable(torch.where(known, logarithms, 0.0).clamp(-bound, bound).exp())

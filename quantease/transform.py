"""Transforms: what is done to a layer before any method, and undone in its answer.

A run has at most one (`transform=...`, conf/transform/), and the same for every method. It sees the layer in its own order
of columns: act-order sorts the columns of the transformed layer.
"""

from dataclasses import dataclass
from typing import Protocol

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


class Transform(Protocol):
    """A frozen dataclass of settings with one function of tensors, `solve`."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def mixes_rows(self) -> bool:
        """Whether the transformed rows depend on each other, so that they cannot be solved on their own."""
        ...

    def solve(self, solver: LayerSolver, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        """The answer to `problem` that `solver` gives to the transformed one; leaves `problem` as it is.

        Raises:
            Unsupported: the method has no answer for this, or needs what the transform cannot give it.
        """
        ...


@dataclass(frozen=True)
class Transformed(LayerSolver):
    """A method behind a transform: what a run solves its layers with."""

    transform: Transform
    solver: LayerSolver

    @property
    def rows_independent(self) -> bool:
        return self.solver.rows_independent and not self.transform.mixes_rows

    @property
    def needs_cross(self) -> bool:
        return self.solver.needs_cross

    @at_normal_scale  # here, too: a transform may have settings that are weights, as MagR's penalty is
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        return self.transform.solve(self.solver, problem, spec)

"""RTN: round every weight to the nearest point of its grid. Ignores the calibration data.

The smallest method there is, and so the one to copy for a new one. Every other method must be at least as good.
"""

from dataclasses import dataclass

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale


@dataclass(frozen=True)
class RTN(LayerSolver):
    """Round to nearest; it has no settings."""

    @property
    def rows_independent(self) -> bool:
        return True

    @property
    def needs_inputs(self) -> bool:
        return False

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        return QuantizedLayer(grid.encode(problem.weight), grid)

"""RTN: round every weight to the nearest point of its grid. Ignores the calibration data."""

from dataclasses import dataclass
from typing import ClassVar

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, QuantizedLayer


@dataclass(frozen=True)
class RTN:
    """Round to nearest."""

    rows_independent: ClassVar[bool] = True

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        grid = problem.fit_grid(spec)
        return QuantizedLayer(grid.encode(problem.weight), grid)

"""What a layer gets that calibration has reached too little: the setting `fallback`.

A layer keeps its own weights with `keep`, but then it counts at the bits that they are stored in and has no error, which
flatters the method. So by default it is rounded to nearest on the run's grid, marked, and counted as that.

An expert is reached too little by fewer tokens than a sixteenth of its inputs. Measured on layers of the bundled model that
were given t random tokens (3 bits; errors on other tokens relative to those of rounding, geometric mean over six layers):

    t / inputs     1/64   1/32   1/16    1/8    1/4    1/2      1      2
    GPTQ           0.94   0.96   1.00   1.00   0.99   0.88   0.64   0.49
    QuantEase      0.85   0.77   0.70   0.65   0.59   0.53   0.66   0.52
    AWQ            1.23   1.15   0.76   0.63   0.57   0.48   0.46   0.43

From a sixteenth on, none is worse on average, though it may be in a layer (GPTQ 1.5 times, AWQ 2.1; with fewer tokens 6.4).
The rule is the same for all methods, so that about the same layers are rounded in all rows of a table. A layer that all
tokens reach goes to the method however few there are: a calibration that is too small for the whole model was asked for.
"""

from dataclasses import dataclass

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer
from quantease.normal_scale import at_normal_scale
from runners.quantization.input_statistics import InputStatistics

TOKENS_PER_INPUT = 1 / 16  # fewer tokens than this times the inputs of a layer are too few to calibrate it on

UNREACHED = "no calibration token has reached it"
NOT_FINITE = "its activations are not finite"


@dataclass(frozen=True)
class RoundToNearest(LayerSolver):
    """What `fallback=rtn` gives a layer. `baselines.rtn` is the same as a method."""

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


def why_not_calibrated(statistics: InputStatistics | None) -> str | None:
    """Why a layer with inputs of these statistics takes the fallback; None: the method gets it.

    Args:
        statistics: None: the run measures no inputs.
    """
    if statistics is None:
        return None
    if not statistics.finite:
        return NOT_FINITE
    tokens, of_tokens, inputs = statistics.tokens, statistics.of_tokens, len(statistics.hessian)
    if tokens is None or of_tokens is None or tokens >= min(of_tokens, TOKENS_PER_INPUT * inputs):
        return None
    return f"only {tokens} of {of_tokens} calibration tokens have reached its {inputs} inputs"

"""Act-order: solve the columns in the order of decreasing input energy, with any method.

From GPTQ's authors' code (option `act-order`): the columns whose errors cost most are rounded first, while all others can
still compensate for them. Which way it helps depends on the model and the method. At 3 bits in groups of 64 on a real
135 M model, perplexity went from 92 to 59 with GPTQ and from 38 to 55 with QuantEase.
"""

from dataclasses import dataclass

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer


@dataclass(frozen=True)
class ActOrder(LayerSolver):
    """Any solver on sorted columns: a wrapper that changes the problem, and the answer back.

    Grid groups stay those of the layer (`LayerProblem.order` remembers them), so the order need not be stored: a method
    that groups the sorted columns, as SpQR does, asks for it by itself.
    """

    solver: LayerSolver

    @property
    def rows_independent(self) -> bool:
        return self.solver.rows_independent

    @property
    def needs_cross(self) -> bool:
        return self.solver.needs_cross

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        # Stable: of equal inputs (dead ones) the first stays first, on every device.
        order = problem.hessian.diagonal().argsort(descending=True, stable=True)
        return self.solver.solve(problem.permuted(order), spec).permuted(order.argsort())

"""Act-order."""

from dataclasses import dataclass

from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer


@dataclass(frozen=True)
class ActOrder(LayerSolver):
    """Any solver, on columns sorted by decreasing Hessian diagonal (act-order). Groups stay those of the layer."""

    solver: LayerSolver

    @property
    def rows_independent(self) -> bool:
        return self.solver.rows_independent

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        order = problem.hessian.diagonal().argsort(descending=True, stable=True)
        return self.solver.solve(problem.permuted(order), spec).permuted(order.argsort())

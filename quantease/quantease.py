"""QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885), Algorithm 2.

Cyclic coordinate descent on ||W X - W_hat X||^2 over the grid, so no matrix is ever inverted or decomposed. Every third
sweep is relaxed: its columns take their unrounded optimum, which lets the next sweep leave a local minimum.
"""

from dataclasses import dataclass, replace

from quantease.descent import sweep
from quantease.grid import GridSpec
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, revive_dead_columns

LAST_RELAXED = 25  # the authors' code leaves no sweep after this one unrounded


@dataclass(frozen=True)
class QuantEase:
    """Algorithm 2, from W or from another method's answer.

    Attributes:
        num_iters: sweeps over all columns.
        relax_every: relax one sweep in so many (the second, the fifth, ... for 3); None: round in every sweep.
        init: the method to start from, on whose grid the sweeps then stay; None: start from W itself.
        track_objective: record the relative error after every sweep, at the cost of another matrix product each.
    """

    num_iters: int = 30
    relax_every: int | None = 3
    init: LayerSolver | None = None
    track_objective: bool = False

    def __post_init__(self) -> None:
        if self.num_iters < 1:
            raise ValueError(f"num_iters must be at least 1, not {self.num_iters}")
        if self.relax_every is not None and self.relax_every < 2:
            raise ValueError(f"relax_every must be at least 2, or null for none, not {self.relax_every}")

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        start = self.init.solve(problem, spec) if self.init else None
        grid = start.grid if start else problem.fit_grid(spec)
        hessian = revive_dead_columns(problem.hessian)
        weight = problem.weight.T.contiguous()
        w_hat = start.weight.T.contiguous() if start else weight.clone()
        residual = weight - w_hat

        history = []
        for iteration in range(self.num_iters):
            sweep(w_hat, residual, hessian, grid if self._rounds(iteration) else None)
            if self.track_objective:
                history.append(problem.relative_error(w_hat.T))
        answer = QuantizedLayer(grid.encode(w_hat.T), grid, history=tuple(history))
        return replace(answer, damping=start.damping, notes=start.notes) if start else answer

    def _rounds(self, iteration: int) -> bool:
        if self.relax_every is None or iteration % self.relax_every != 1:
            return True
        return iteration > LAST_RELAXED or iteration == self.num_iters - 1

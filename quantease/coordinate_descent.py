"""QuantEase (Behdin et al., 2023, https://arxiv.org/abs/2309.01885), Algorithm 2.

Cyclic coordinate descent on ||W X - W_hat X||^2 over the grid, so no matrix is ever inverted or decomposed. Every third
sweep is relaxed: its columns take their unrounded optimum, which lets the next sweep leave a local minimum.

Ancestors, both of QuIP (Chee et al., 2023, https://arxiv.org/abs/2307.13304): its `allbal` is coordinate descent from W
without relaxed sweeps, as `quantease` with relax_every=null; its `ldlqRG` is act-order, LDLQ (which equals GPTQ) and then
coordinate descent, as `gptq_quantease` with act_order=true and relax_every=null; baselines/ldlqrg.py is that method.

The authors' release (linkedin/QuantEase) is no oracle for tests: its `gptq_quantease` refines towards the GPTQ weights
instead of W, its outlier mode never updates the quantized part, and its group-wise rounding uses the last group's scale
for all groups. The tests transcribe the equations of the paper instead (tests/reference.py).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantease.conditioning import damp_rank_deficient
from quantease.grid import Grid, GridSpec
from quantease.grids.uniform import UniformGrid
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from quantease.normal_scale import at_normal_scale
from quantease.refit import refit
from quantease.sweeps import Convergence, Residual, hessian_with_positive_diagonal, sweep

LAST_RELAXED = 25  # counted from 0; all later sweeps round, as in the authors' code: the default's last four settle


@dataclass(frozen=True)
class Schedule:
    """Which of the sweeps round.

    Attributes:
        num_iters: sweeps over all columns.
        relax_every: relax one sweep in so many (the second, the fifth, ... for 3); None: round in every sweep.
    """

    num_iters: int
    relax_every: int | None

    def __post_init__(self) -> None:
        if self.num_iters < 1:
            raise ValueError(f"num_iters must be at least 1, not {self.num_iters}")
        if self.relax_every is not None and self.relax_every < 2:
            raise ValueError(f"relax_every must be at least 2, or null for none, not {self.relax_every}")

    def rounds(self, iteration: int) -> bool:
        """Whether sweep `iteration`, counted from 0, rounds. The last one always does."""
        # The first sweep rounds, from wherever it starts; the relaxed ones follow a rounded sweep: 1, 4, 7, ... for 3.
        if self.relax_every is None or iteration % self.relax_every != 1:
            return True
        return iteration > LAST_RELAXED or iteration == self.num_iters - 1

    def only_rounds_after(self, iteration: int) -> bool:
        """Whether sweep `iteration` and all after it round. Then a sweep that changes nothing shows that none of the rest
        will; a relaxed sweep would change everything again.
        """
        return all(self.rounds(later) for later in range(iteration, self.num_iters))


@dataclass(frozen=True)
class QuantEase(LayerSolver):
    """Algorithm 2, from W or from another method's answer.

    Attributes:
        num_iters: sweeps over all columns; fewer if a sweep changes no code and so none of the rest would. 0: none, for an
            answer of `init` that is only refitted.
        relax_every: relax one sweep in so many (the second, the fifth, ... for 3); None: round in every sweep.
        init: the method to start from. The sweeps keep its grid, its outliers and its scaling of the columns, and still
            approximate W. None: start from W itself.
        grid_refits: after the sweeps, solve scales and zero points for the codes and sweep again, so many times. Beyond
            the paper; zero points become fractional and are counted with 16 bits.
        sweeps_per_refit: sweeps after each refit; 0: the codes stay what they are.
        refit_zeros: a refit solves the zero points, too; otherwise it solves the scales alone, and no more bits are stored.
        track_objective: record the relative error after every sweep and refit, at the cost of a matrix product each.
    """

    num_iters: int = 30
    relax_every: int | None = 3
    init: LayerSolver | None = None
    grid_refits: int = 0
    sweeps_per_refit: int = 3
    track_objective: bool = False
    # Younger than published results, whose digests (runners/identity.py) are without it.
    refit_zeros: bool = field(default=True, metadata={"counts_if": lambda solver: not solver.refit_zeros})

    def __post_init__(self) -> None:
        if self.num_iters != 0 or self.init is None:  # without sweeps W itself would only be rounded
            Schedule(self.num_iters, self.relax_every)
        if self.grid_refits < 0 or self.sweeps_per_refit < 0:
            raise ValueError("grid_refits and sweeps_per_refit must not be negative")

    @property
    def rows_independent(self) -> bool:  # each row has its own scale and residual, whatever starts the sweeps
        return self.init is None or self.init.rows_independent

    @property
    def needs_cross(self) -> bool:
        return self.init is not None and self.init.needs_cross

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        start = self.init.solve(problem, spec) if self.init else None
        if start is None:
            return self._descend(problem, problem.fit_grid(spec), problem.weight)
        problem = _remaining_problem(problem, start)
        answer = self._descend(problem, start.grid, start.grid.decode(start.codes))
        return replace(
            start,
            codes=answer.codes,
            grid=answer.grid,
            damping=start.damping if answer.damping is None else answer.damping,
            damping_raised=start.damping_raised or answer.damping_raised,
            notes=start.notes + answer.notes,
            history=answer.history,
        )

    def _descend(self, problem: LayerProblem, grid: Grid, start: Tensor) -> QuantizedLayer:
        # Published descent has no damping, and there is none but where the Hessian leaves many directions undetermined.
        damped, damping, notes = damp_rank_deficient(problem.hessian)
        hessian = hessian_with_positive_diagonal(damped)
        target = problem.weight.T  # everything from here on is (in, out)
        w_hat = start.T.clone(memory_format=torch.contiguous_format)
        residual = Residual(target, w_hat)
        history: list[float] = []

        def track() -> None:
            if self.track_objective:
                history.append(problem.relative_error(w_hat.T))

        schedule, convergence = Schedule(max(self.num_iters, 1), self.relax_every), Convergence(w_hat.device)
        for iteration in range(self.num_iters):
            may_stop = schedule.only_rounds_after(iteration)
            rounds = schedule.rounds(iteration)
            sweep(w_hat, target, residual, hessian, grid if rounds else None, convergence if may_stop else None)
            track()
            if may_stop and convergence.reached():
                break
        for _ in range(self.grid_refits):
            if not isinstance(grid, UniformGrid):
                raise Unsupported("scales are solved for given codes on the int grid alone: take grid_refits=0")
            # The Hessian without the unit curvature that sweeps give to dead inputs: with it, their weights would pull at
            # the scale.
            grid = refit(w_hat, target, residual, damped, grid, self.refit_zeros)
            track()
            for _ in range(self.sweeps_per_refit):
                sweep(w_hat, target, residual, hessian, grid)
                track()
        del residual  # the largest tensor here: its memory is needed for encoding
        raised, codes = damping is not None, self._codes(problem, grid, w_hat)
        return QuantizedLayer(codes, grid, damping=damping, damping_raised=raised, notes=notes, history=tuple(history))

    def _codes(self, problem: LayerProblem, grid: Grid, w_hat: Tensor) -> Tensor:
        codes = grid.encode(w_hat.T)
        if self.grid_refits and not self.sweeps_per_refit:  # no sweep has rounded dead inputs to the new scales
            dead = problem.hessian.diagonal() == 0
            codes[:, dead] = grid.encode(problem.weight)[:, dead]
        return codes


def _remaining_problem(problem: LayerProblem, start: QuantizedLayer) -> LayerProblem:
    """The problem that is left for the codes of `start`, given its outliers S and column scale s.

    Its weight is decode(codes) / s + S, so the codes approximate (W - S) s, on inputs divided by s. The order matters:
    outliers are added in the layer's own scale.
    """
    if start.outliers is not None:
        values = replace(start.outliers, values=-start.outliers.values)
        problem = replace(problem, weight=values.add_to(problem.weight.clone()))
    return problem if start.column_scale is None else problem.scaled(start.column_scale)

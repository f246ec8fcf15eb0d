"""LDLQ with greedy passes (QuIP, Chee et al., 2023, https://arxiv.org/abs/2307.13304), its method `ldlqRG`.

The columns in the order of decreasing Hessian diagonal; LDLQ, which gives the same weights as GPTQ (the paper's Theorem 6);
then coordinate descent from its answer, column after column in the same order,

    q_j <- round(q_j + ((w - q) H)_j / H_jj),

with codes that may leave their range during a pass and are clamped after it, until a pass changes nothing. So act-order,
GPTQ and cyclic coordinate descent were published together before QuantEase: this is the ancestor of `gptq_quantease`, and
with ldlq=false, which starts the passes from the unrounded weights as QuIP's `allbal` does, that of `quantease`.

LDLQ may round at random, up or down with the odds that make the expectation right: with `rounding=random` the answer is an
unbiased estimate of the weights, as long as they are within the range.

Where this departs from the authors' code, which numbers the columns in rising order and visits the last one first (the
same order as here):

- Theirs keeps the D = w - q of a pass from before the codes are clamped, so that the next one corrects weights that are no
  longer there. Here D is that of the clamped codes.
- Levels (nf4, mxfp4, nvfp4) end at the largest: there is nothing beyond it to clamp, so descent stays within them.
- Their preprocessing (incoherence) is a matter of its own; the grid is the one that all methods share.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baselines.gptq import answer_on, coupling_of, feed_back
from quantease.act_order import ActOrder
from quantease.cholesky import inverse_factor
from quantease.grid import Grid, GridSpec
from quantease.kernels import Columns
from quantease.layer import LayerProblem, LayerSolver, QuantizedLayer, Unsupported
from quantease.normal_scale import at_normal_scale
from quantease.sweeps import Residual, hessian_with_positive_diagonal, sweep

BEYOND = 2**15  # codes on either side of the range, which a pass does not leave; exact in float32 beside a fraction


@dataclass(frozen=True)
class LDLQGreedy(LayerSolver):
    """`ldlqRG`, or one of its stages alone.

    Attributes:
        ldlq: start from LDLQ's answer; False: from the unrounded weights, as QuIP's `allbal`.
        greedy_passes: passes of coordinate descent at most; 0: LDLQ alone.
        rounding: of LDLQ: `nearest`, or `random`, which the passes would undo: it needs greedy_passes=0.
        act_order: the largest diagonal entry first; False: QuIP's `ldlq`, in the order of the layer.
        damping: as of GPTQ. LDLQ and the passes have the same damped Hessian.
        seed: of the random rounding.
    """

    ldlq: bool = True
    greedy_passes: int = 9
    rounding: str = "nearest"
    act_order: bool = True
    damping: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.damping < 0 or self.greedy_passes < 0:
            raise ValueError(f"damping and greedy_passes must not be negative: {self.damping}, {self.greedy_passes}")
        if self.rounding not in ("nearest", "random"):
            raise ValueError(f"rounding must be nearest or random, not {self.rounding!r}")
        if not self.ldlq and not self.greedy_passes:
            raise ValueError("ldlq=false and greedy_passes=0 leave nothing to do: method=rtn rounds to nearest")
        if self.rounding == "random" and (self.greedy_passes or not self.ldlq):
            raise ValueError("rounding=random is that of LDLQ alone, which greedy passes undo: set greedy_passes=0")

    @property
    def rows_independent(self) -> bool:
        return self.rounding == "nearest"  # the numbers that are drawn for a row depend on how many come before it

    @at_normal_scale
    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        if self.act_order:
            return ActOrder(replace(self, act_order=False)).solve(problem, spec)
        if self.rounding == "random" and spec.format is not None:
            raise Unsupported(
                f"random rounding needs levels at equal distances, which {spec.format.name} does not have"
            )
        grid = problem.fit_grid(spec)
        factor, damping = inverse_factor(problem, self.damping)
        values = self._ldlq(problem, grid, coupling_of(factor)) if self.ldlq else problem.weight.T.clone()
        if self.greedy_passes:
            self._descend(values, problem, grid, damping)
        return answer_on(grid, values, self.damping, damping)

    def _ldlq(self, problem: LayerProblem, grid: Grid, coupling: Tensor) -> Tensor:
        """The values (in, out) of LDLQ."""
        weight, columns = problem.weight.T.clone(memory_format=torch.contiguous_format), grid.columns()
        if self.rounding == "random":
            # floor(x + u) for a uniform u of 0 to 1 is the nearest whole number to x + u - 1/2.
            draws = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5
            alive = problem.hessian.diagonal()[:, None] > 0
            weight = disturbed(weight, draws.to(weight) * columns.scale[columns.group] * alive, coupling)
        return feed_back(weight, coupling, columns)

    def _descend(self, values: Tensor, problem: LayerProblem, grid: Grid, damping: float) -> None:
        """The greedy passes, in place."""
        hessian = damped_hessian(problem, damping)
        target, free = problem.weight.T, _Unclamped(grid)
        residual = Residual(target, values)
        for _ in range(self.greedy_passes):
            before = values.clone()
            sweep(values, target, residual, hessian, free)
            values.copy_(grid.decode(grid.encode(values.T)).T)
            if torch.equal(values, before):
                return
            residual.update(target, values)


def disturbed(weight: Tensor, noise: Tensor, coupling: Tensor) -> Tensor:
    """The weights (in, out) with which GPTQ's pass rounds t + `noise` to nearest wherever it would have rounded t.

    The pass would feed the noise back as a part of the rounding error. With the strict upper triangle C of the coupling,
    t_k = w_k - sum_{j<k} C_jk (q_j - t_j), so a pass over x_k = w_k + noise_k - sum_{j<k} C_jk noise_j has x'_k = t_k +
    noise_k: what it feeds back of the noise is in its weights already.
    """
    return (weight + noise).sub_(coupling.triu(1).T @ noise)


def damped_hessian(problem: LayerProblem, damping: float) -> Tensor:
    """The Hessian (in, in) with `damping` times the mean diagonal of the live inputs; dead ones have unit curvature."""
    diagonal = problem.hessian.diagonal()
    alive = diagonal > 0
    hessian = problem.hessian.clone()
    hessian.diagonal().add_(alive * (damping * diagonal.sum() / alive.sum().clamp(min=1)))
    return hessian_with_positive_diagonal(hessian)


@dataclass(frozen=True, eq=False)
class _Unclamped:
    """A grid for sweeps whose codes may leave their range; one of levels as it is."""

    grid: Grid

    def columns(self) -> Columns:
        columns = self.grid.columns()
        if columns.levels is not None:
            return columns
        return replace(columns, zero=columns.zero + BEYOND, max_code=columns.max_code + 2 * BEYOND)

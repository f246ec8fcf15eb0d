"""The layer-wise problem that every method solves, and the answer that every method returns.

Given a weight W (out, in) and the Hessian H = sum x x^T (in, in) of its calibration inputs X, find W_hat on a
quantization grid that makes ||W X - W_hat X||_F^2 = tr((W - W_hat) H (W - W_hat)^T) small.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from quantease.grid import Grid, GridSpec


class Unsupported(Exception):
    """A method cannot do what is asked of it. The message says what and why; the run is recorded as unsupported."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One linear layer to quantize."""

    weight: Tensor  # (out, in), float32
    hessian: Tensor  # (in, in), float32, symmetric; its overall scale never matters
    order: Tensor | None = None  # (in,), where each column stands in the layer; None: in its place

    def permuted(self, order: Tensor) -> "LayerProblem":
        """The same problem with its input columns in another order."""
        places = order if self.order is None else self.order[order]
        return LayerProblem(self.weight[:, order], self.hessian[order][:, order], places)

    def fit_grid(self, spec: GridSpec) -> Grid:
        """The min-max grid of the weight. A group holds neighbors of the layer, in whatever order the columns are."""
        if self.order is None:
            return Grid.fit(self.weight, spec)
        return Grid.fit(self.weight[:, self.order.argsort()], spec).permuted(self.order)

    @cached_property
    def energy(self) -> float:
        """||W X||^2, what the errors are relative to."""
        return objective(self.weight, self.hessian)

    def relative_error(self, weight: Tensor) -> float:
        """||W X - W_hat X||^2 / ||W X||^2 for W_hat = `weight`; 0 where the layer's output is zero anyway."""
        return objective(weight - self.weight, self.hessian) / self.energy if self.energy > 0 else 0.0

    @property
    def dead_columns(self) -> int:
        """How many inputs were zero in all of the calibration data."""
        return int((self.hessian.diagonal() == 0).sum())


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A solver's answer, `weight = grid.decode(codes)`, and what the solver had to do to find it."""

    codes: Tensor  # (out, in), uint8
    grid: Grid
    damping: float | None = None  # the fraction of the mean Hessian diagonal that was really added to it
    notes: tuple[str, ...] = ()  # whatever did not go as asked, in words
    history: tuple[float, ...] = ()  # relative error after each sweep, where the solver was told to track it

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 (out, in)."""
        return self.grid.decode(self.codes)

    @property
    def bits_per_weight(self) -> float:
        """Everything that must be stored, in bits, divided by the number of weights."""
        return self.grid.bits_per_weight

    def permuted(self, order: Tensor) -> "QuantizedLayer":
        """The same answer with its input columns in another order."""
        return replace(self, codes=self.codes[:, order], grid=self.grid.permuted(order))


class LayerSolver(Protocol):
    """A quantization method: a frozen dataclass of hyper-parameters with one pure function of tensors."""

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        """Quantize one layer; leaves `problem` as it is.

        Raises:
            Unsupported: the method has no answer for this `spec`.
        """
        ...


@dataclass(frozen=True)
class ActOrder:
    """Any solver, on columns sorted by decreasing Hessian diagonal (act-order). Grid and groups stay the same."""

    solver: LayerSolver

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        order = problem.hessian.diagonal().argsort(descending=True, stable=True)
        return self.solver.solve(problem.permuted(order), spec).permuted(order.argsort())


def objective(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = `difference` (out, in): the squared error of the layer's outputs."""
    return max(0.0, (difference @ hessian).mul_(difference).sum(dtype=torch.float64).item())


def revive_dead_columns(hessian: Tensor) -> Tensor:
    """A copy of `hessian` in which inputs that are always zero have unit curvature.

    Such a column cannot change the output, so every solver then rounds it to nearest.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    return hessian

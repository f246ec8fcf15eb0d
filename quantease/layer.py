"""The layer-wise problem that every method solves, and the answer that every method returns.

Given a weight W (out, in) and the Hessian H = sum x x^T (in, in) of its calibration inputs X, find W_hat on a
quantization grid that makes ||W X - W_hat X||_F^2 = tr((W - W_hat) H (W - W_hat)^T) small.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from quantease.grid import Grid, GridSpec
from quantease.sparse import Outliers


class Unsupported(Exception):
    """A method cannot do what is asked of it. The message says what and why; the run is recorded as unsupported."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One linear layer to quantize."""

    weight: Tensor  # (out, in), float32
    hessian: Tensor  # (in, in), float32, symmetric; its overall scale never matters
    order: Tensor | None = None  # (in,), where each column stands in the layer; None: in its place
    mean_input: Tensor | None = None  # (in,), the mean of |x| over the calibration tokens, for methods that look at it
    siblings: tuple[Tensor, ...] = ()  # weights of the other layers that receive the same input

    def permuted(self, order: Tensor) -> "LayerProblem":
        """The same problem with its input columns in another order."""
        return replace(
            self,
            weight=self.weight[:, order],
            hessian=self.hessian[order][:, order],
            order=order if self.order is None else self.order[order],
            mean_input=None if self.mean_input is None else self.mean_input[order],
            siblings=tuple(weight[:, order] for weight in self.siblings),
        )

    def scaled(self, scale: Tensor) -> "LayerProblem":
        """The same problem with column j of the weight multiplied by `scale` (in,), and its input divided by it."""
        return replace(
            self,
            weight=self.weight * scale,
            hessian=self.hessian / scale / scale[:, None],
            mean_input=None if self.mean_input is None else self.mean_input / scale,
            siblings=tuple(weight * scale for weight in self.siblings),
        )

    def fit_grid(self, spec: GridSpec, weight: Tensor | None = None) -> Grid:
        """The grid of the weight, or of another `weight` with the columns in the same order.

        A group holds neighbors of the layer, in whatever order the columns of the problem are.
        """
        weight = self.weight if weight is None else weight
        if self.order is None:
            return Grid.fit(weight, spec)
        return Grid.fit(weight[:, self.order.argsort()], spec).permuted(self.order)

    @cached_property
    def energy(self) -> float:
        """||W X||^2, what the errors are relative to."""
        return objective(self.weight, self.hessian)

    def relative_error(self, weight: Tensor) -> float:
        """||W X - W_hat X||^2 / ||W X||^2 for W_hat = `weight`; 0 where the layer's output is zero anyway."""
        return objective(weight - self.weight, self.hessian) / self.energy if self.energy > 0 else 0.0

    @cached_property
    def dead_columns(self) -> int:
        """How many inputs were zero in all of the calibration data."""
        return int((self.hessian.diagonal() == 0).sum())


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A solver's answer, `weight = grid.decode(codes) / column_scale + outliers`, and what it took to find it."""

    codes: Tensor  # (out, in), uint8
    grid: Grid
    outliers: Outliers | None = None
    column_scale: Tensor | None = None  # (in,), stored in 16 bits
    damping: float | None = None  # the fraction of the mean Hessian diagonal that was really added to it
    damping_raised: bool = False  # because the factorization failed with what was asked for
    notes: tuple[str, ...] = ()  # whatever did not go as asked, in words
    history: tuple[float, ...] = ()  # relative error after each sweep, where the solver was told to track it

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 (out, in)."""
        weight = self.grid.decode(self.codes)
        if self.column_scale is not None:
            weight = weight / self.column_scale
        return weight if self.outliers is None else self.outliers.add_to(weight)

    @property
    def outlier_ratio(self) -> float:
        """The share of the weights that are kept in 16 bits."""
        return 0.0 if self.outliers is None else len(self.outliers.values) / self.codes.numel()

    @property
    def bits_per_weight(self) -> float:
        """Everything that must be stored, in bits, divided by the number of weights."""
        bits = self.grid.bits_per_weight
        if self.outliers is not None:
            bits += self.outliers.bits / self.codes.numel()
            if self.outliers.whole_columns:
                bits -= self.grid.spec.bits * self.outlier_ratio
        return bits + (0 if self.column_scale is None else 16 / len(self.codes))

    def select_rows(self, rows: slice) -> "QuantizedLayer":
        """The answer for some of the rows, of a method that takes each row on its own."""
        if self.outliers is not None:
            raise ValueError("outliers are chosen among all rows: this answer cannot be divided")
        return replace(self, codes=self.codes[rows], grid=self.grid.select_rows(rows))

    def permuted(self, order: Tensor) -> "QuantizedLayer":
        """The same answer with its input columns in another order."""
        outliers = self.outliers
        if outliers is not None:
            outliers = replace(outliers, columns=order.argsort()[outliers.columns])
        scale = None if self.column_scale is None else self.column_scale[order]
        codes, grid = self.codes[:, order], self.grid.permuted(order)
        return replace(self, codes=codes, grid=grid, outliers=outliers, column_scale=scale)


class LayerSolver(Protocol):
    """A quantization method: a frozen dataclass of hyper-parameters with one pure function of tensors, `solve`.

    What the harness has to know about a method before it calls `solve` is a property here, with a default that suits
    every method. A method that derives from this class, `class Mine(LayerSolver)`, inherits the defaults and overrides
    those that do not describe it.
    """

    @property
    def rows_independent(self) -> bool:
        """Whether the answer for one row of the weight does not depend on the other rows; by default it may.

        If True, layers that share an input are solved as one layer, and a layer that does not fit in memory in slices of
        rows. If False, each layer is solved whole and on its own.
        """
        return False

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        """Quantize one layer; leaves `problem` as it is.

        Raises:
            Unsupported: the method has no answer for this `spec`.
        """
        ...


def join_rows(parts: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """One answer from those for consecutive slices of the rows, of a method that takes each row on its own."""
    first = parts[0]
    if len(parts) == 1:
        return first
    scale = torch.cat([part.grid.scale for part in parts])
    zero = torch.cat([part.grid.zero for part in parts])
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        grid=replace(first.grid, scale=scale, zero=zero),
        damping_raised=any(part.damping_raised for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        history=(),  # relative to what each slice puts out: there is no sum of them
    )


def objective(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = `difference` (out, in): the squared error of the layer's outputs."""
    return max(0.0, (difference @ hessian).mul_(difference).sum(dtype=torch.float64).item())

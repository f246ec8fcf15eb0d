"""The contract of a method: the layer-wise problem that it is given, and the quantized layer that it returns.

Given a weight W (out, in) and the Hessian H = sum x x^T (in, in) of its calibration inputs X, find W_hat on a
quantization grid that makes ||W X - W_hat X||_F^2 = tr((W - W_hat) H (W - W_hat)^T) small.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from quantease.conditioning import faint_inputs
from quantease.grid import Grid, GridSpec
from quantease.grids.rotation import Rotation
from quantease.sparse import Outliers


class Unsupported(Exception):
    """A method cannot do what is asked of it. The message says what and why; the run is recorded as unsupported."""


@dataclass(frozen=True, eq=False)
class LayerProblem:
    """One linear layer to quantize.

    Attributes:
        weight: (out, in), float32.
        hessian: (in, in), float32, symmetric, the sum of x x^T over the calibration tokens. A method's answer does not
            depend on its overall scale. A diagonal entry of zero marks a dead input, one that was zero in all tokens.
            Inputs too small to be seen beside the others (`quantease.conditioning.FAINT`) are made dead here, so that
            all methods round their weights to nearest.
        order: (in,), the place in the layer that each column of this problem has; None: its own.
        mean_input: (in,), the mean of |x| over the calibration tokens, which AWQ needs.
        cross: (in, in), the *cross moment* sum (x - x^) x^^T, on the scale of the Hessian: x^ are the inputs that the
            Hessian is of, x those of the same tokens in the unquantized model, so it is what the inputs have lost in the
            quantized blocks before. None but for a method with `needs_cross`.
        cross_half: (in, in), the part of `cross` that every second calibration sequence adds: the difference of the two
            parts tells noise from loss. None where `cross` is.
        siblings: weights (out of each, in) of the other layers that receive the same input, for methods whose layers
            share something.
    """

    weight: Tensor
    hessian: Tensor
    order: Tensor | None = None
    mean_input: Tensor | None = None
    siblings: tuple[Tensor, ...] = ()
    cross: Tensor | None = None
    cross_half: Tensor | None = None

    def __post_init__(self) -> None:
        faint = faint_inputs(self.hessian)
        if not faint.any():
            return
        hessian = self.hessian.clone()  # the caller's own is left as it is
        hessian[faint], hessian[:, faint] = 0, 0
        object.__setattr__(self, "hessian", hessian)
        if self.mean_input is not None:
            object.__setattr__(self, "mean_input", self.mean_input.masked_fill(faint, 0))
        for name in ("cross", "cross_half"):  # only x^ is faint: x may be an input that the layer has lost
            if (moment := getattr(self, name)) is not None:
                object.__setattr__(self, name, moment.masked_fill(faint, 0))

    def permuted(self, order: Tensor) -> "LayerProblem":
        """The same problem with its input columns in another order."""
        return replace(
            self,
            weight=self.weight[:, order],
            **self._moments(lambda moment: moment[order][:, order]),
            order=order if self.order is None else self.order[order],  # permutations compose
            mean_input=None if self.mean_input is None else self.mean_input[order],
            siblings=tuple(weight[:, order] for weight in self.siblings),
        )

    def scaled(self, scale: Tensor) -> "LayerProblem":
        """The same problem with column j of the weight multiplied by `scale` (in,), and its input divided by it.

        (W s) (X / s) = W X, so the layer's output and its errors stay what they are.
        """
        return replace(
            self,
            weight=self.weight * scale,
            **self._moments(lambda moment: moment / scale / scale[:, None]),
            mean_input=None if self.mean_input is None else self.mean_input / scale,
            siblings=tuple(weight * scale for weight in self.siblings),
        )

    def _moments(self, changed: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The second moments (in, in) of the inputs, each as `changed`, by their names; without those that there are not."""
        moments = {"hessian": self.hessian, "cross": self.cross, "cross_half": self.cross_half}
        return {name: changed(moment) for name, moment in moments.items() if moment is not None}

    def fit_grid(self, spec: GridSpec, weight: Tensor | None = None, like: Grid | None = None) -> Grid:
        """The grid of the weight, or of another `weight` with the columns in the same order; `like`: see `GridSpec.fit`.

        A grid group holds neighboring columns of the layer, in whatever order the columns of the problem are: they are
        put back in place, fitted, and permuted again.
        """
        weight = self.weight if weight is None else weight
        if self.order is None:
            return spec.fit(weight, like)
        return spec.fit(weight[:, self.order.argsort()], like).permuted(self.order)

    @cached_property
    def energy(self) -> float:
        """||W X||^2, the squared output of the layer, to which errors are relative."""
        return objective(self.weight, self.hessian)

    def relative_error(self, weight: Tensor) -> float:
        """||W X - W_hat X||^2 / ||W X||^2 for W_hat = `weight`; 0 where the layer's output is zero anyway."""
        return objective(weight - self.weight, self.hessian) / self.energy if self.energy > 0 else 0.0

    @cached_property
    def dead_columns(self) -> int:
        """How many inputs were zero, or too small to be seen, in the calibration data: nothing is known of their weights."""
        return int((self.hessian.diagonal() == 0).sum())


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A method's answer, `weight = 2^exponent (grid.decode(codes) / column_scale + outliers)`, and its diagnostics.

    With a `rotation`, what is in the brackets is the weight in another basis.

    Attributes:
        codes: (out, in), uint8.
        grid: what the codes stand for.
        outliers: sparse weights in high precision; None: the method keeps none.
        column_scale: (in,), stored in 16 bits per column; None: columns are not scaled.
        exponent: of the power of two that the whole layer is multiplied by (quantease/normal_scale.py), 8 bits where it
            is not 0.
        damping: the fraction of the mean Hessian diagonal that was added to the diagonal; None: the method adds none.
        damping_raised: it is more than was asked for, because the factorization failed with that.
        notes: sentences about what did not go as asked.
        history: relative error after each sweep, for methods that are asked to track it.
        rotation: the basis that codes, outliers and column scales are in; None: that of the layer.
    """

    codes: Tensor
    grid: Grid
    outliers: Outliers | None = None
    column_scale: Tensor | None = None
    exponent: int = 0
    damping: float | None = None
    damping_raised: bool = False
    notes: tuple[str, ...] = ()
    history: tuple[float, ...] = ()
    rotation: Rotation | None = None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, float32 (out, in)."""
        weight = self.grid.decode(self.codes)
        if self.column_scale is not None:
            weight = weight / self.column_scale
        if self.outliers is not None:
            weight = self.outliers.add_to(weight)
        if self.rotation is not None:
            weight = self.rotation.undo(weight)
        return weight * 2.0**self.exponent if self.exponent else weight

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
            if self.outliers.whole_columns:  # a column that is kept whole needs no codes
                bits -= self.grid.spec.bits * self.outlier_ratio
        bits += 0 if self.column_scale is None else 16 / len(self.codes)  # shared by all rows of a column
        bits += 0 if self.rotation is None else self.rotation.bits(self.codes.numel())
        return bits + (8 / self.codes.numel() if self.exponent else 0)

    def select_rows(self, rows: slice) -> "QuantizedLayer":
        """The answer for some of the rows, given by a method whose rows are independent.

        Raises:
            ValueError: there are outliers, which are chosen among all rows, or a rotation, which mixes them.
        """
        if self.outliers is not None:
            raise ValueError("outliers are chosen among all rows: this answer cannot be divided")
        if self.rotation is not None:
            raise ValueError("a rotation mixes all rows: this answer cannot be divided")
        return replace(self, codes=self.codes[rows], grid=self.grid.of_rows(rows))

    def permuted(self, order: Tensor) -> "QuantizedLayer":
        """The same answer with its input columns in another order.

        Raises:
            ValueError: the columns are those of another basis, which are not the layer's.
        """
        if self.rotation is not None:
            raise ValueError("the columns of a rotated layer cannot be put in another order: rotate first, then sort")
        outliers = self.outliers
        if outliers is not None:
            outliers = replace(
                outliers, columns=order.argsort()[outliers.columns]
            )  # column c moves to where order is c
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

    @property
    def needs_inputs(self) -> bool:
        """Whether the answer depends on the inputs, so on `hessian` and `mean_input`; by default it does.

        If False, the method also runs without calibration data: all inputs of its problems are then dead ones.
        """
        return True

    @property
    def needs_cross(self) -> bool:
        """Whether the answer depends on `cross`; by default it does not.

        If True, the unquantized model walks through the calibration sequences in step with the quantized one.
        """
        return False

    def solve(self, problem: LayerProblem, spec: GridSpec) -> QuantizedLayer:
        """Quantize one layer; leaves `problem` as it is.

        Raises:
            Unsupported: the method has no answer for this `spec`.
        """
        ...


def join_rows(parts: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """One answer from those for consecutive slices of the rows, given by a method whose rows are independent."""
    first = parts[0]
    if len(parts) == 1:
        return first
    # Slices of unusual scale have powers of two of their own. Scales, float32 here, take up the difference exactly.
    exponent = max(part.exponent for part in parts)
    exponents = [part.exponent - exponent for part in parts]
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        grid=first.grid.stacked([part.grid for part in parts[1:]], exponents),
        exponent=exponent,
        damping_raised=any(part.damping_raised for part in parts),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
        history=(),  # each is relative to the output of its own slice, so they do not add up
    )


def objective(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H D^T) for D = `difference` (out, in): the squared error of the layer's outputs, summed over all tokens."""
    # The sum has as many terms as weights, so it is made in float64. It is never negative, but for rounding errors
    # where D is in the null space of H.
    return max(0.0, (difference @ hessian).mul_(difference).sum(dtype=torch.float64).item())

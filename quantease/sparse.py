"""Sparse weights in high precision that a layer stores besides its codes."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outliers:
    """Sparse weights that are added to those of the grid.

    Attributes:
        whole_columns: they fill whole input columns, whose codes need not be stored.
        value_bits: bits that each value is stored in: 16, or 32 where the scales of the grid have 32.
    """

    rows: Tensor  # (count,)
    columns: Tensor  # (count,)
    values: Tensor  # (count,), float32
    whole_columns: bool = False
    value_bits: int = 16

    @property
    def bits(self) -> float:
        """Bits of the values and their places: 16 + 16 per outlier, or 16 per value and 16 per column if structured.

        16 bits of place are the column; the rows follow from where each begins in a list sorted by rows, whose lengths
        are not counted, as in SpQR (https://arxiv.org/abs/2306.03078, Section 4.3: 32 bits per outlier).
        """
        places = len(self.columns.unique()) if self.whole_columns else len(self.values)
        return self.value_bits * len(self.values) + 16 * places

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) with the outliers added in place; they are stored as what the grid lacks at their places."""
        return weight.index_put_((self.rows, self.columns), self.values.to(weight.dtype), accumulate=True)

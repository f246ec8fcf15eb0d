"""Outliers."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Outliers:
    """Weights that are kept beside the grid, in 16 bits unless otherwise said, to which they are added.

    Attributes:
        whole_columns: they fill whole input columns, whose codes need not be stored.
        value_bits: that a value is stored in: as many as a scale of the grid.
    """

    rows: Tensor  # (count,)
    columns: Tensor  # (count,)
    values: Tensor  # (count,), float32
    whole_columns: bool = False
    value_bits: int = 16

    @property
    def bits(self) -> float:
        """What the values and their places take: 32 bits an outlier, or 16 bits and 16 more a column."""
        places = len(self.columns.unique()) if self.whole_columns else len(self.values)
        return self.value_bits * len(self.values) + 16 * places

    def add_to(self, weight: Tensor) -> Tensor:
        """`weight` (out, in) with the outliers added in place."""
        return weight.index_put_((self.rows, self.columns), self.values.to(weight.dtype), accumulate=True)

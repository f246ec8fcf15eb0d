"""Which tokens rule a layer's calibration: how the energy ||x||^2 of an input is divided among the tokens.

The Hessian is a sum of x x^T over the calibration tokens, and its trace a sum of their energies. Where a few tokens have
nearly all of it, such as the first token of a window in many language models (Sun et al., 2024, Massive Activations), a
solver that lowers tr(D H D^T) serves these tokens alone, and the error of the layer tells nothing about the others.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TOP_SHARE = 0.01  # of the tokens: those with the largest inputs


@dataclass(frozen=True)
class TokenEnergy:
    """How the energy of an input is divided among the calibration tokens; None: it cannot be told.

    Attributes:
        top_percent: the share of the energy (0 to 1) that the 1 % of the tokens with the largest inputs have.
        max_over_median: the largest energy of a token over that of the median token.
        position: where in a sequence (from 0) its token of the largest energy is, most often.
        position_share: in how many of the sequences it is there, as a share.
    """

    top_percent: float | None = None
    max_over_median: float | None = None
    position: int | None = None
    position_share: float | None = None

    @classmethod
    def of(cls, energies: list[Tensor]) -> "TokenEnergy":
        """The division of energies that were measured batch by batch.

        Args:
            energies: of each batch, (sequences, length); or (tokens,) where an input has lost the order of the tokens,
                as that of an expert. float32.
        """
        every = torch.cat([batch.flatten() for batch in energies]).double()
        total = every.sum().item()
        if not 0 < total < math.inf:
            return cls()
        count = max(1, round(TOP_SHARE * len(every)))
        # sorted and not quantile, which refuses more than 2^24 numbers
        ordered = every.sort(descending=True).values
        middle = len(every) // 2
        median = ((ordered[middle] + ordered[(len(every) - 1) // 2]) / 2).item()
        ratio = ordered[0].item() / median if median > 0 else math.inf
        top_share = ordered[:count].sum().item() / total
        return cls(top_share, ratio if ratio < math.inf else None, *_most_common_position(energies))

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> "TokenEnergy":
        """The inverse of `tensor`."""
        top, ratio, position, share = (None if math.isnan(number) else number for number in numbers.tolist())
        return cls(top, ratio, None if position is None else int(position), share)

    @property
    def tensor(self) -> Tensor:
        """The four numbers, float64 (4,), in the order of the attributes, NaN for None: as the cache keeps them."""
        numbers = (self.top_percent, self.max_over_median, self.position, self.position_share)
        return torch.tensor([math.nan if number is None else float(number) for number in numbers], dtype=torch.float64)


def _most_common_position(energies: list[Tensor]) -> tuple[int | None, float | None]:
    """`position` and `position_share`."""
    if any(batch.dim() != 2 for batch in energies):
        return None, None
    places = torch.cat([batch[batch.amax(1) > 0].argmax(1) for batch in energies])  # of those that have any energy
    positions, counts = places.unique(return_counts=True)
    most = int(counts.argmax())  # of several the first
    return int(positions[most]), counts[most].item() / len(places)

"""A layer whose codes stand for its weight in another basis: W' = U (W s) V^T, with orthogonal U and V and a scale s.

In the rotated basis the entries of the weight are about equally large, whatever outliers it has (incoherence processing of
QuIP, https://arxiv.org/abs/2307.13304). U and V are Hadamard matrices times random signs, as QuIP#
(https://arxiv.org/abs/2402.04396) takes them; where a size is no power of two, the Kronecker product of a Hadamard matrix
and a discrete cosine transform. So the seed of the signs and s are all that must be stored.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SEED_BITS = 32  # of the seed, per layer
SCALE_BITS = 16  # of s, per column


@dataclass(frozen=True, eq=False)
class Rotation:
    """The basis of a layer.

    Attributes:
        seed: of the signs, 0 to 2^32 - 1; both sides of a square layer have signs of their own.
        scale: s (in,), positive, float32.
    """

    seed: int
    scale: Tensor

    def of_weight(self, weight: Tensor) -> Tensor:
        """U (W s) V^T for a weight W (out, in)."""
        return _rotated(self.of_inputs(weight * self.scale).T, 2 * self.seed).T

    def of_inputs(self, rows: Tensor) -> Tensor:
        """R V^T for rows R (any, in): the inputs of the layer, divided by s, in the new basis."""
        return _rotated(rows, 2 * self.seed + 1)

    def of_moment(self, moment: Tensor) -> Tensor:
        """V (M / s s^T) V^T for a moment M (in, in) of the inputs, such as the Hessian."""
        scaled = moment / self.scale / self.scale[:, None]
        return self.of_inputs(self.of_inputs(scaled).T).T

    def undo(self, weight: Tensor) -> Tensor:
        """U^T W' V / s, the weight (out, in) that W' stands for."""
        columns = _rotated_back(weight, 2 * self.seed + 1)
        return _rotated_back(columns.T, 2 * self.seed).T / self.scale

    def bits(self, weights: int) -> float:
        """Bits of what is stored, divided by the number of weights."""
        return (SEED_BITS + SCALE_BITS * len(self.scale)) / weights


def _rotated(rows: Tensor, seed: int) -> Tensor:
    """R T^T for rows R (any, n) and the orthogonal T = (cosines (x) Hadamard) diag(signs)."""
    return _transformed(rows * _signs(rows, seed), transposed=False)


def _rotated_back(rows: Tensor, seed: int) -> Tensor:
    """R T: the inverse of `_rotated`."""
    return _transformed(rows, transposed=True) * _signs(rows, seed)


def _signs(rows: Tensor, seed: int) -> Tensor:
    """Random signs (n,), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (1 - 2 * torch.randint(2, (rows.shape[1],), generator=generator)).to(rows)


def _transformed(rows: Tensor, transposed: bool) -> Tensor:
    """Rows (any, n) under the Kronecker product of m cosines and a Hadamard matrix, for n = m 2^k with odd m."""
    count, n = rows.shape
    power = n & -n  # 2^k
    pieces = _hadamard(rows.reshape(-1, power)).view(count, n // power, power)
    if n == power:
        return pieces.view(count, n)
    cosines = _cosines(n // power).to(rows)
    return torch.matmul(cosines.T if transposed else cosines, pieces).view(count, n)


def _hadamard(rows: Tensor) -> Tensor:
    """Rows (any, 2^k) times the symmetric, orthogonal Hadamard matrix: the fast transform, with sums of two numbers."""
    count, n = rows.shape
    width = 1
    while width < n:
        pairs = rows.view(count, n // (2 * width), 2, width)
        rows = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(count, n)
        width *= 2
    return rows / math.sqrt(n)


def _cosines(size: int) -> Tensor:
    """The orthogonal discrete cosine transform (size, size), float64: no entry is larger than sqrt(2 / size)."""
    numbers = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (numbers + 0.5) * numbers[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix

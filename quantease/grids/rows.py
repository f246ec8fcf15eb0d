"""Rows of a layer, a few at a time."""

from collections.abc import Iterator

from torch import Tensor

ROWS_BYTES = 2**24  # of a float32 matrix that are encoded at once: its half a dozen copies on the way stay below 100 MB


def row_slices(weight: Tensor) -> Iterator[slice]:
    """Slices of the rows, each so small that the copies that are made of it on the way stay small beside the layer."""
    step = max(1, ROWS_BYTES // (weight.shape[1] * 4))
    return (slice(start, start + step) for start in range(0, len(weight), step))

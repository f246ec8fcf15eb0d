"""Three errors of a quantized layer, each on the layer's weights W_hat as the model has them.

    relative_error    tr(D H D^T) / tr(W H W^T)      D = W - W_hat; H of the calibration tokens, as the solver was given it
    held_out_error    the same, with the H of tokens that the solver has not seen, each counting by its energy
    token_error       mean over held-out tokens x of ||D x||^2 / ||W x||^2: every token counts alike

The first two are ratios of sums, so tokens with large inputs decide them; the third is a mean of ratios.
"""

import torch
from torch import Tensor

from quantease.grid import GridSpec
from quantease.layer import objective


def relative_error(original: Tensor, written: Tensor, hessian: Tensor, slices: int = 1) -> float:
    """||W X - W_hat X||^2 / ||W X||^2; 0 where the layer's output is zero anyway.

    Args:
        original: W (out, in), float32.
        written: W_hat (out, in) as the model has it, so with the rounding to the model's dtype.
        hessian: the mean of x x^T (in, in).
        slices: of the rows, taken one after the other: D H is as large as W.
    """
    error = energy = 0.0
    for w, w_hat in zip(original.chunk(slices), written.chunk(slices), strict=True):
        error += objective(w_hat.float() - w, hessian)
        energy += objective(w, hessian)
    return error / energy if energy > 0 else 0.0


def token_error(original: Tensor, written: Tensor, tokens: Tensor, slices: int = 1) -> float | None:
    """The mean over tokens of ||(W - W_hat) x||^2 / ||W x||^2; None where W x is zero for all of them.

    Args:
        original: W (out, in), float32.
        written: W_hat (out, in) as the model has it.
        tokens: inputs x (tokens, in), in the dtype of the model.
        slices: of the rows, taken one after the other.
    """
    x = tokens.float()
    largest = x.abs().amax(1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1)  # which changes no ratio, and keeps the squares within float32
    scale = original.abs().max()
    scale = torch.where(scale > 0, scale, 1)  # likewise
    error, energy = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    for w, w_hat in zip(original.chunk(slices), written.chunk(slices), strict=True):
        error += (x @ ((w_hat.float() - w) / scale).T).square().sum(1)
        energy += (x @ (w / scale).T).square().sum(1)
    seen = energy > 0
    return (error[seen] / energy[seen]).mean().item() if seen.any() else None


def rounding_error(weight: Tensor, dtype: torch.dtype, spec: GridSpec, hessian: Tensor, slices: int = 1) -> float:
    """The relative error of rounding to nearest on a grid, as a model of `dtype` would have it."""
    grid = spec.fit(weight)
    return relative_error(weight, grid.decode(grid.encode(weight)).to(dtype), hessian, slices)

"""Whether the machine has room for an audit, which holds more than a run does: the whole model, not one block of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from runners.errors import InputError
from runners.models.blocks import decoder_blocks, linear_layers
from runners.models.checkpoint import Checkpoint
from runners.models.memory import out_of_memory

GB = 1e9


def refuse_without_room(checkpoint: Checkpoint, ids: Tensor, device: torch.device, bytes_per_weight: int) -> None:
    """Refuse a model that does not fit, before it is loaded: a process that takes too much host memory is killed.

    Args:
        ids: token ids (windows, length) that are measured on.
        device: where the model will be.
        bytes_per_weight: of the model while it computes.

    Raises:
        InputError: with what it takes and what there is.
    """
    blocks = decoder_blocks(checkpoint.skeleton)
    linear = sum(layer.weight.numel() for block in blocks for layer in linear_layers(block).values())
    model = checkpoint.parameters * bytes_per_weight
    width = checkpoint.config.get_text_config().hidden_size
    # Two copies of every layer's weights, and what enters every block.
    host = 2 * linear * checkpoint.stored_bits // 8 + len(blocks) * ids.numel() * width * bytes_per_weight
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        _refuse("GPU", model, free)
    else:
        host += model
    _refuse("machine", host, there)


@contextmanager
def explained(windows: int) -> Iterator[None]:
    """Within it, memory that runs out gets a sentence.

    Args:
        windows: how many are measured on.

    Raises:
        InputError: memory has run out.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            "memory ran out: an audit holds the whole model and, on the host, what enters each of its blocks. Take fewer "
            f"windows (windows={max(1, windows // 2)}), batch_size=1, dtype=run, device=cpu or a larger machine"
        ) from None


def _refuse(what: str, needed: int, there: int) -> None:
    if needed > there:
        raise InputError(
            f"an audit holds the whole model, which does not fit: it takes {needed / GB:.1f} GB and this {what} has "
            f"{there / GB:.1f} GB. Take fewer windows, dtype=run, device=cpu, or a larger {what}"
        )

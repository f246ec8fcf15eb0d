"""Activations in host memory, where the GPU has no room for them, and their way to the GPU ahead of the work."""

from collections.abc import Iterator

import torch
from torch import Tensor

GPU_SHARE = (
    0.4  # of the GPU's free memory that activations may take: a block, its Hessians and its solver need the rest
)


def would_crowd_gpu(hidden: Tensor, tokens: int) -> bool:
    """Whether the activations of all sequences would take more than their share of the GPU's free memory.

    Args:
        hidden: the activations of one batch (sequences, length, width).
        tokens: of all sequences together.
    """
    if not hidden.is_cuda:
        return False
    free, _ = torch.cuda.mem_get_info(hidden.device)
    return tokens * hidden.shape[-1] * hidden.element_size() > GPU_SHARE * free


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory; in pinned memory for a tensor of the GPU, as only that is copied beside other work."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor)


def copied_ahead(batches: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Batches of host memory on `device`, each copied while the one before it is worked on."""
    if device.type != "cuda":
        yield from batches
        return
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def fetch(batch: Tensor) -> Tensor:
        copies.wait_stream(work)  # the pass before may still be writing its outputs to this batch
        with torch.cuda.stream(copies):
            return batch.to(device, non_blocking=True)

    coming = fetch(batches[0])
    for place in range(len(batches)):
        work.wait_stream(copies)  # before the next copy is queued, which this batch's work need not wait for
        batch = coming
        if place + 1 < len(batches):
            coming = fetch(batches[place + 1])
        batch.record_stream(work)  # made on the other stream: its memory may not be reused before the work has read it
        yield batch

"""Walks of the same windows through a model whose weights change: a change in block i runs the blocks from i on alone.

What enters every block is kept from one walk through the whole model, the base. L layers in B blocks then cost about L/2
passes through the model and L passes through its head, and the host's memory holds B times the activations of the windows.
"""

from typing import Any

import torch
from torch import Tensor

from runners.audit.damage import Damage, damage_of
from runners.evaluation.blockwise import windows_at_once
from runners.evaluation.likelihood import measure_windows
from runners.evaluation.token_agreement import TokenAgreement
from runners.models.activations import BlockActivations, copy_to_host
from runners.models.blocks import InMemoryModel
from runners.models.containers import with_tensors
from runners.models.memory import Memory

State = tuple[list[Tensor], list[dict[str, Any]]]  # per batch: activations, and what blocks hand to later ones


class Walks:
    """Walks of some windows, compared with the first.

    Args:
        source: the model, whole in memory; as it is now, it is what all later walks are compared with.
        ids: token ids (windows, length).
        batch_size: windows that go through a block together.
    """

    def __init__(self, source: InMemoryModel, ids: Tensor, batch_size: int) -> None:
        self._source, self._ids = source, ids
        self._activations = BlockActivations(source, ids, batch_size, memory=Memory(offload=False))
        self._entering = [self._state()]  # what enters each block of the base
        self.base()
        self._unquantized = list(self._activations.hidden)

    def base(self) -> None:
        """Walk through the whole model as it is now, and keep what enters every block."""
        self._restore(self._entering[0])
        self._entering = []
        for index in range(len(self._source.blocks)):
            self._entering.append(self._state())
            self._activations.advance(index)

    def change(self, index: int) -> None:
        """Walk from what enters block `index` of the base through the model as it is now."""
        self._restore(self._entering[index])
        for later in range(index, len(self._source.blocks)):
            self._activations.advance(later)

    def measure(self) -> Damage:
        """What the last walk's model has lost."""
        rows = windows_at_once(self._source, self._ids.shape[1])
        kl, losses, first = [], [], 0
        for hidden, unquantized in zip(self._activations.hidden, self._unquantized, strict=True):
            for part, expected in zip(hidden.split(rows), unquantized.split(rows), strict=True):
                ids = self._ids[first : first + len(part)].to(self._source.device)
                first += len(part)
                tokens = TokenAgreement()
                logits, reference = self._activations.logits(part), self._activations.logits(expected)
                losses.append(measure_windows(logits, ids, reference, tokens)["nll"])
                # Added some positions of all these windows at a time.
                kl.append(torch.cat([some.reshape(len(part), -1) for some in tokens.kl], 1))
        return damage_of(torch.cat(kl), torch.cat(losses))

    def _state(self) -> State:
        activations = self._activations
        if (
            self._source.device.type != "cuda"
        ):  # advancing puts new tensors in the place of these, which stay as they are
            return list(activations.hidden), list(activations.shared)
        return list(map(copy_to_host, activations.hidden)), [
            with_tensors(shared, copy_to_host) for shared in activations.shared
        ]

    def _restore(self, state: State) -> None:
        hidden, shared = state
        self._activations.hidden = [batch.to(self._source.device) for batch in hidden]
        self._activations.shared = list(shared)

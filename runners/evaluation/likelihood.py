"""Loss, agreement and perplexity from logits: numbers of windows, wherever the logits come from.

A window of T tokens predicts T - 1 of them. Its loss is the mean negative log-likelihood of these tokens in nats; the
perplexity of a text is the exponential of the mean over its windows. This is GPTQ's protocol
(https://github.com/IST-DASLab/gptq, `opt_eval` in opt.py) but for one factor: its code multiplies a window's mean by T and
divides the sum by T times the number of windows, which cancels.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from runners.evaluation.token_agreement import TokenAgreement

# Positions of a window whose distributions over the vocabulary are computed at once. KL needs several float32 tensors of
# (positions, vocabulary) per window: with OPT's 50,272 entries 26 MB each, where all 2,048 positions would take 412 MB.
POSITIONS_AT_ONCE = 128
CPU_BYTES = 2**20  # of one such tensor on a CPU, whose caches then hold all of them: four times as fast as from memory


def measure_windows(
    logits: Tensor, ids: Tensor, reference: Tensor | None = None, tokens: TokenAgreement | None = None
) -> dict[str, Tensor]:
    """Means over the predicted tokens of each window.

    Args:
        logits: (windows, length, vocabulary), any floating dtype. The last position is not used: the token that it
            predicts is not in the window.
        ids: (windows, length), on the device of the logits.
        reference: logits of the unquantized model, of the same shape.
        tokens: takes the KL of every token, where there is a reference.

    Returns:
        `nll`, the negative log-likelihood in nats. With a reference also `kl`, the Kullback-Leibler divergence
        KL(reference || model) in nats, and `top1`, the share of positions where both models have the same most likely
        token. Each float64 (windows,), in host memory.
    """
    count = ids.shape[1] - 1
    # Log-probabilities in float32, because half precision keeps 3 digits, fewer than tables show. Sums over positions in
    # float64, so that adding thousands of terms brings no rounding of its own.
    sums = {name: torch.zeros(len(ids), dtype=torch.float64, device=logits.device) for name in ("nll", "kl", "top1")}
    positions = _positions_at_once(logits)
    for first in range(0, count, positions):
        here = slice(first, min(first + positions, count))
        predicted = log_softmax(logits[:, here].float(), -1)
        target = ids[:, here.start + 1 : here.stop + 1]
        sums["nll"] -= predicted.gather(-1, target[..., None])[..., 0].double().sum(1)
        if reference is not None:
            expected = log_softmax(reference[:, here].float(), -1)
            # From log-probabilities, not from a quotient of probabilities: those of rare tokens underflow to 0.
            kl = expected.exp().mul_(expected - predicted).sum(-1)
            if tokens is not None:
                tokens.add(kl, expected)
            sums["kl"] += kl.double().sum(1)
            # Of logits, as log-probabilities of tokens that are nearly as likely may be rounded to the same number.
            most_likely = logits[:, here].argmax(-1) == expected.argmax(-1)
            sums["top1"] += most_likely.double().sum(1)
    measured = ("nll",) if reference is None else ("nll", "kl", "top1")
    return {name: (sums[name] / count).cpu() for name in measured}


def _positions_at_once(logits: Tensor) -> int:
    if logits.device.type != "cpu":
        return POSITIONS_AT_ONCE
    return max(1, min(POSITIONS_AT_ONCE, CPU_BYTES // (4 * logits.shape[0] * logits.shape[2])))  # 4 bytes per float32


def perplexity(losses: Tensor) -> float:
    """exp of the mean loss over windows (in nats); every window counts alike because all predict as many tokens."""
    return losses.mean().exp().item()


@torch.no_grad()
def window_losses(model: Any, windows: Tensor, batch_size: int) -> Iterator[Tensor]:
    """The loss (nats) of each window from the forward pass of a whole model, float64 (batch,), batch by batch.

    The plain form of what `runners.evaluation.blockwise` measures block by block: the training of the bundled model uses
    it, and the tests hold the other to it.

    Args:
        windows: token ids (windows, length).
        batch_size: windows that go through the model together.
    """
    device = next(model.parameters()).device
    for batch in windows.split(batch_size):
        ids = batch.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        yield losses.double().reshape(len(batch), -1).mean(dim=1).cpu()

"""What changed weights do to the next-token distributions: KL from the unquantized model, and which tokens carry it."""

import math
from dataclasses import asdict, dataclass

import numpy as np
from torch import Tensor

from runners.evaluation.likelihood import perplexity

FIRST_POSITIONS = (
    4  # of a window: its first tokens often have inputs of enormous length, which decide what a solver protects
)
TOP_SHARE = 0.01


@dataclass(frozen=True)
class Damage:
    """Measures over the predicted tokens of all windows. KL is KL(unquantized || changed) in nats.

    Attributes:
        kl: mean.
        kl_p99: 99th percentile.
        ppl: perplexity.
        share_top_percent: the share of the sum of KL in the 1 % of the tokens that have most of it; None: the sum is zero.
        kl_first_positions: mean over the predictions at positions 0 to 3 of a window.
        kl_rest: mean over all others; None: the windows have none.
    """

    kl: float
    kl_p99: float
    ppl: float
    share_top_percent: float | None
    kl_first_positions: float
    kl_rest: float | None

    @property
    def row(self) -> dict[str, float | None]:
        """The measures as columns of `audit.csv`."""
        return asdict(self)


def damage_of(kl: Tensor, losses: Tensor) -> Damage:
    """The measures from the KL of every token.

    Args:
        kl: in nats (windows, predicted positions), any floating dtype.
        losses: mean negative log-likelihood of each window in nats, float64.
    """
    kl = kl.double().cpu()
    tokens = kl.flatten().sort(descending=True).values
    total = tokens.sum().item()
    top = tokens[: math.ceil(TOP_SHARE * len(tokens))].sum().item()
    rest = kl[:, FIRST_POSITIONS:]
    return Damage(
        kl=kl.mean().item(),
        kl_p99=float(np.quantile(tokens.numpy(), 0.99)),
        ppl=perplexity(losses),
        share_top_percent=top / total if total > 0 else None,
        kl_first_positions=kl[:, :FIRST_POSITIONS].mean().item(),
        kl_rest=rest.mean().item() if rest.numel() else None,
    )

"""The KL divergence of every predicted token, and what is told of it beside its mean.

A mean hides a few tokens that went very wrong, and mixes tokens of which the unquantized model is sure with those where any
word would do.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from runners.results.metrics import CONFIDENCE_EDGES, KL_QUANTILES, confidence_kl, confidence_share


@dataclass
class TokenAgreement:
    """KL divergences and confidences of the tokens of one text, in the order in which they were added, float32."""

    kl: list[Tensor] = field(default_factory=list)
    confidence: list[Tensor] = field(default_factory=list)

    def add(self, kl: Tensor, expected: Tensor) -> None:
        """Add some tokens.

        Args:
            kl: in nats (windows, positions).
            expected: log-probabilities of the unquantized model (windows, positions, vocabulary).
        """
        self.kl.append(kl.flatten())
        self.confidence.append(expected.amax(-1).exp().flatten())

    def summary(self) -> dict[str, float]:
        """Quantiles of KL; and for each bucket of the unquantized model's confidence, its share of the tokens and mean KL.

        A bucket without tokens has no mean.
        """
        kl = torch.cat(self.kl).double().cpu().numpy()
        confidence = torch.cat(self.confidence).double().cpu().numpy()
        found = dict(zip(KL_QUANTILES, np.quantile(kl, list(KL_QUANTILES.values())).tolist(), strict=True))
        # The last edge is 1, and a confidence of 1 belongs to the bucket below it.
        buckets = np.clip(np.digitize(confidence, CONFIDENCE_EDGES) - 1, 0, len(CONFIDENCE_EDGES) - 2)
        for bucket in range(len(CONFIDENCE_EDGES) - 1):
            inside = buckets == bucket
            found[confidence_share(bucket)] = float(inside.mean())
            if inside.any():
                found[confidence_kl(bucket)] = float(kl[inside].mean())
        return found

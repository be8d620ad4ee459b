"""OLoRA: orthonormal low-rank adaptation (Büyükakyüz 2024, arXiv:2406.01775).

    W  = Q R                                     QR without pivoting, in float32
    B0 = Q[:, :r],  A0 = R[:r]                   B0^T B0 = I;  B0 A0 = B0 B0^T W
    dW = s (B A - B0 A0),  A = A0 and B = B0     so that dW = 0 at the start

The QR only says where A and B start. Both are trained from there, unconstrained, as in LoRA. B0 A0
is the projection of W on the span of its own first r columns, so it depends on the order of the
input features; it is not the principal part of W (that is PiSSA's).

Departs from the paper, which replaces W by W - s B0 A0: here W stays as it is and the start is
subtracted from the update. What is trained and what comes out are the same.
"""

from typing import Literal, final

import torch
from torch import Tensor

from lorakit.adapter import Factors, Promises, Variant
from lorakit.subtracted import Subtracted, SubtractedConfig


class OLoRAConfig(SubtractedConfig):
    """OLoRA: has no settings of its own."""

    variant: Literal["olora"]


@final
class OLoRALinear(Subtracted):
    """dW = s (B A - B0 A0), started at the QR of W."""

    def start(self, W: Tensor, config: OLoRAConfig) -> Factors:
        """R[:r] and Q[:, :r], from the first r columns alone: O(m r (n + r)), not O(m n min(m, n)).

        Householder's reflections up to the r-th never see the columns after it; those follow from
        R = Q^T W.
        """
        Q, R = torch.linalg.qr(W[:, : self.r])  # (m, r), (r, r)
        return Factors(torch.cat([R, Q.T @ W[:, self.r :]], dim=1), Q)


VARIANT = Variant(OLoRAConfig, OLoRALinear, promises=Promises(pair_ranks=2))

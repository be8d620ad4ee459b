"""PiSSA: principal singular values and vectors adaptation (Meng et al. 2024, arXiv:2404.02948).

    W  = U diag(S) V^T                           SVD in float32, singular values falling
    B0 = U[:, :r] (S[:r] / s)^(1/2),  A0 = (S[:r] / s)^(1/2) V[:, :r]^T
    dW = s (B A - B0 A0),  A = A0 and B = B0     so that dW = 0 at the start

s B0 A0 is the best approximation of W at rank r, whatever s is. A rank whose singular value is 0
starts with A = 0 and B = 0, has no gradient, and never learns.

Departs from the paper, which replaces W by W - s B0 A0: here W stays as it is and the start is
subtracted from the update. What is trained and what comes out are the same.
"""

from typing import Literal, final

import torch
from pydantic import PositiveInt
from torch import Tensor

from lorakit.adapter import Factors, Promises, Variant
from lorakit.subtracted import Subtracted, SubtractedConfig


class PiSSAConfig(SubtractedConfig):
    """PiSSA."""

    variant: Literal["pissa"]
    iterations: PositiveInt | None = None
    """Subspace iterations of a randomised SVD (Halko et al. 2011), much faster on large matrices;
    null: the exact SVD."""


@final
class PiSSALinear(Subtracted):
    """dW = s (B A - B0 A0), started at the largest r singular values of W."""

    def start(self, W: Tensor, config: PiSSAConfig) -> Factors:
        if config.iterations is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W, self.r, config.iterations)
            Vh = V.T
        root = (S[: self.r] / self.scale).sqrt()  # (r,)
        return Factors(root[:, None] * Vh[: self.r], U[:, : self.r] * root)


VARIANT = Variant(PiSSAConfig, PiSSALinear, promises=Promises(pair_ranks=2))

"""The loss of written words: cross-entropy over a vocabulary, without its copies."""

from typing import Any

import torch
from torch import Tensor

PIECE = {"cpu": 2**20}
"""How many logits are looked at in float32 at once, by kind of device; 4 MiB lie in a cache."""
LARGE = 2**26
"""On all others, for whom every piece is a dozen kernels to start: 256 MiB."""


def word_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target in nats, float32: (targets,), of logits (targets, words).

    As cross_entropy of the logits in float32 has it. But that keeps their logarithms for the
    backward pass, and there has two gradients of that size besides: of 1,000 targets among 49,152
    words 600 MB, where the bfloat16 logits have 100. Here a piece of them at a time is float32,
    and what the backward pass needs is computed again.
    """
    losses: Tensor = _WordLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _WordLosses(torch.autograd.Function):
    """log sum_j exp z_j - z_t; its gradient is softmax(z) less 1 at t."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        size = _rows(logits)
        sums = torch.cat([piece.float().logsumexp(-1) for piece in logits.split(size)])
        ctx.save_for_backward(logits, targets, sums)
        return sums - logits.gather(1, targets[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        given, found = gradients[0], torch.empty_like(logits)
        every = (x.split(_rows(logits)) for x in (logits, targets, sums, given, found))
        for z, t, total, g, out in zip(*every, strict=True):
            p = (z.float() - total[:, None]).exp_()
            p.scatter_add_(1, t[:, None], p.new_full((len(t), 1), -1.0))
            out.copy_(p.mul_(g[:, None]))
        return found, None


def _rows(logits: Tensor) -> int:
    """How many rows of them make a piece."""
    return max(1, PIECE.get(logits.device.type, LARGE) // logits.size(1))

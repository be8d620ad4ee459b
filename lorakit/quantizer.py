"""Learned bit-widths: Bayesian Bits (van Baalen et al., NeurIPS 2020, arXiv:2005.07093).

    Q_b(x) = s_b round(x / s_b),   s_b = 2 beta / (2^b - 1)       b = 2, 4, 8, 16
    Q_32(x) = x                                                   all on x clipped to [-beta, beta]
    Q(x) = Q_2 + z_4 (e_4 + z_8 (e_8 + z_16 (e_16 + z_32 e_32)))  e_b = Q_b(x) - Q_b/2(x)

A ladder of residuals with a gate z on every rung: rungs open up to b give b bits. The paper has
e_b = s_b round((x - Q_b/2(x)) / s_b), which is the same but at ties: s_b/2 is a whole multiple of
s_b, and rounding commutes with whole numbers. Multiplied out, Q is a mean of the five,

    Q(x) = sum_b v_b Q_b(x),   v_b = z_4 ... z_b (1 - z_2b),   sum_b v_b = 1

which is what is computed: no rung waits for another, and hard gates give exactly step * code.

Rounding passes gradients straight through, so with hard or soft gates (note that sum v = 1)

    dQ/dx = 1 where |x| <= beta, else 0        dQ/dv_b = Q_b(x)
    dQ/dbeta = (Q(x) - x) / beta where |x| <= beta, else sign(x)

Gates are hard-concrete (Louizos et al., ICLR 2018, arXiv:1712.01312) in training and thresholded in
evaluation.

Departs from the authors' code: the range is always signed and its bound is what clips, so that no
code leaves its width; the range is learned as log beta, so that its rate is relative, whatever the
size of the tensor; 32 bits are float32 as it is.
"""

from math import log
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lorakit.codes import BITS, top

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
"""Of the hard-concrete distribution: its temperature, and what it is stretched to."""
SHIFT = TEMPERATURE * log(-LOW / HIGH)
"""P(z > 0) = sigmoid(phi - SHIFT)."""
THRESHOLD = SHIFT - log(0.34 / 0.66)
"""In evaluation a gate is open where P(z = 0) < 0.34, that is phi > -0.9353."""
DEAD = -2.0
"""At and below this logit a gate is 0 in training too, as in the authors' code: for good, since
only the penalty is left to move it."""

ROUNDED = BITS[:-1]  # 2, 4, 8, 16
STEPS = torch.tensor([2 / (2**bits - 1) for bits in ROUNDED])  # of a bound of 1
TOPS = torch.tensor([float(top(bits)) for bits in ROUNDED])


def sample(phi: Tensor) -> Tensor:
    """Gates z in [0, 1] of the shape of `phi`, each with a noise of its own."""
    noise = torch.logit(torch.rand_like(phi), eps=1e-6)
    z = torch.sigmoid((noise + phi) / TEMPERATURE) * (HIGH - LOW) + LOW
    return z.clamp(0.0, 1.0) * (phi > DEAD)


def is_open(phi: Tensor) -> Tensor:
    """Gates in evaluation, as booleans."""
    return phi > THRESHOLD


def on(phi: Tensor) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(phi - SHIFT)


def chain(phi: Tensor) -> Tensor:
    """The expected length of a chain of gates in which one is on only if all before it are.

    sum_i P_1 ... P_i over the last axis: the complexity term, the Kullback-Leibler divergence to
    the prior of strength lambda divided by lambda.
    """
    return on(phi).cumprod(dim=-1).sum(dim=-1)


def bits_of(phi: Tensor) -> list[int]:
    """The widths that quantisers with logits `phi` (q, 4) have in evaluation."""
    return [BITS[rungs] for rungs in is_open(phi).long().cumprod(dim=-1).sum(dim=-1).tolist()]


def shares(z: Tensor) -> Tensor:
    """v (q, 5) from the gates z (q, 4): what each width has in the mean."""
    reached = torch.nn.functional.pad(z.cumprod(dim=-1), (1, 1))  # (q, 6); 0 at both ends
    reached[:, 0] = 1.0  # nothing gates 2 bits
    return reached[:, :-1] - reached[:, 1:]


class _Ladder(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, log_bound: Tensor, v: Tensor) -> Tensor:
        bound = log_bound.exp()
        column = (-1,) + (1,) * x.ndim
        steps = (bound * STEPS.to(x.device)).view(column)
        tops = TOPS.to(x.device).view(column)
        rungs = torch.empty((len(BITS), *x.shape), device=x.device)
        torch.div(x, steps, out=rungs[:-1]).round_().clamp_(-tops, tops).mul_(steps)
        torch.clamp(x, -bound, bound, out=rungs[-1])
        q = (v @ rungs.flatten(1)).view_as(x)
        ctx.save_for_backward(x, bound, rungs, q)
        return q

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        x, bound, rungs, q = ctx.saved_tensors
        inside = x.abs() <= bound
        passed = grad * inside
        by_log_bound = (grad * q).sum() - (passed * x).sum()
        return passed, by_log_bound, rungs.flatten(1) @ grad.flatten()


def ladder(x: Tensor, log_bound: Tensor, v: Tensor) -> Tensor:
    """Q(x) for a float32 tensor, with bound exp(`log_bound`) and the shares `v` (5,)."""
    return _Ladder.apply(x, log_bound, v)  # type: ignore[no-any-return, no-untyped-call]

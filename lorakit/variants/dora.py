"""DoRA: weight-decomposed low-rank adaptation (Liu et al., ICML 2024, arXiv:2402.09353).

    W' = diag(c) (W + s B A),    c = d / ||W + s B A||       norms of rows, (m,)
    dW = W' - W

A and B turn the rows of W, as LoRA does; the magnitudes d (m,) say how long they are. d starts as
||W||, so that c = 1 and dW = 0. In backward the norm is a constant (section 4.3).

c rescales rows of W whole, so dW has full rank: no plain pair does the same.

Departs from the paper, as the authors' code does (NVlabs/DoRA, tuners/dora.py): one magnitude for
each output, where the paper's norms are of columns. Departs from that code where there is dropout:
it drops entries of x before diag(c - 1) W x too, which takes a second product with W. Here, as in
every variant, they are dropped before A alone.
"""

from typing import Literal, final

import torch
from torch import Tensor, nn

from lorakit.adapter import (
    Adapter,
    Factors,
    Plan,
    Promises,
    Variant,
    VariantConfig,
    plain_parameters,
    thin,
)
from lorakit.base import dense_weight
from lorakit.errors import NotLowRankError

TINY = 1e-30
"""Least square of a norm: a row of W that is 0 has no direction to rescale."""


class DoRAConfig(VariantConfig):
    """DoRA. It has no settings of its own."""

    variant: Literal["dora"]


@final
class DoRALinear(Adapter):
    """W' x = diag(c) (W x + s B A x)."""

    squares: Tensor

    def __init__(self, base: nn.Module, config: DoRAConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        self.A, self.B = plain_parameters(base, plan)
        squares = dense_weight(base).square().sum(dim=1)
        self.register_buffer("squares", squares, persistent=False)  # ||W||^2, of rows
        self.d = nn.Parameter(self.norms())

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return thin(x, self.A, self.scale * self.B, y)

    def finish(self, y: Tensor) -> Tensor:
        """c (y - b) + b, which is y where c is 1, also to the last bit."""
        excess = (self.d / self.norms() - 1).to(y.dtype)  # a c near 1 is coarse in bfloat16
        bias = self.base.bias
        return y + excess * (y - bias if isinstance(bias, Tensor) else y)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """||W + s B A||, of rows, (m,), without the m x n sum.

        ||w + s b A||^2 = ||w||^2 + 2 s b . A w + s^2 b A A^T b^T, for rows w of W and b of B.
        """
        A, B = self.A, self.scale * self.B
        cross = dense_weight(self.base) @ A.T  # (m, r)
        return (self.squares + (B * (2 * cross + B @ (A @ A.T))).sum(1)).clamp_min(TINY).sqrt()

    @torch.no_grad()
    def delta(self) -> Tensor:
        W = dense_weight(self.base)
        moved = torch.addmm(W, self.B, self.A, alpha=self.scale)
        return (self.d / self.norms())[:, None] * moved - W

    def factors(self) -> Factors:
        raise NotLowRankError(
            "DoRA rescales whole rows of W, which no plain pair of small matrices does: there is "
            "nothing to prune and nothing that a new adapter could start from. `lorakit merge` "
            "writes base and update as one model; `lorakit eval` and `predict` take the run."
        )


VARIANT = Variant(DoRAConfig, DoRALinear, promises=Promises(low_rank=False))

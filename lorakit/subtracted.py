"""What variants share that start from W itself: a pair whose start is subtracted."""

from abc import abstractmethod
from typing import Any

import torch
from pydantic import field_validator
from torch import Tensor, nn

from lorakit.adapter import Adapter, Factors, Plan, VariantConfig, thin
from lorakit.base import dense_weight, device_of


class SubtractedConfig(VariantConfig):
    """The settings of variants whose start is taken from W and subtracted."""

    source: str | None = None
    """Over a quantised base: a model in full precision, named as `model.name` is, whose W the start
    is taken from; null: from the quantised W."""

    @property
    def weights_from(self) -> str | None:
        return self.source

    @field_validator("init_from")
    @classmethod
    def _one_start(cls, folder: str | None) -> str | None:
        if folder is not None:
            raise ValueError(
                "this variant takes its start from W; `variant: lora` goes on from an adapter"
            )
        return folder


class Subtracted(Adapter):
    """A pair that starts at a part of W, and subtracts what it starts at.

        dW = s (B A - B0 A0),    A = A0 and B = B0 at the start

    The papers edit W to W - s B0 A0 and add s B A. With W left alone outputs and gradients are
    the same, a quantised W needs no second quantisation, and the adapter can be taken off. It is
    computed as one pair of rank 2r:

        dW = s (B - B0) A + s B0 (A - A0) = s [B - B0, B0] [A; A - A0]

    which is exactly 0 at the start. The differences are taken in float32: cast to bfloat16 first,
    B A and B0 A0 would agree in all their digits for as long as the steps are small.
    """

    A0: Tensor
    B0: Tensor

    def __init__(self, base: nn.Module, config: VariantConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        if plan.fresh:
            W = dense_weight(base) if plan.weight is None else plan.weight()
            first = self.start(W, config)
        else:
            A0 = torch.zeros(self.r, self.n, device=device_of(base))
            first = Factors(A0, torch.zeros(self.m, self.r, device=A0.device))
        self.register_buffer("A0", first.A.contiguous())
        self.register_buffer("B0", first.B.contiguous())
        self.A, self.B = nn.Parameter(self.A0.clone()), nn.Parameter(self.B0.clone())

    @abstractmethod
    def start(self, W: Tensor, config: Any) -> Factors:
        """A0 (r, n) and B0 (m, r), from W (m, n) in float32."""

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return thin(x, *self._pair(), y)

    def factors(self) -> Factors:
        A, B = self._pair()
        return Factors(A.detach(), B.detach())

    def _pair(self) -> Factors:
        A = torch.cat([self.A, self.A - self.A0])  # (2r, n)
        B = torch.cat([self.B - self.B0, self.B0], dim=1)  # (m, 2r)
        return Factors(A, self.scale * B)

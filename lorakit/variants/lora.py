"""LoRA: low-rank adaptation (Hu et al., ICLR 2022, arXiv:2106.09685).

    dW = s B A,   A ~ U(-1/sqrt(n), 1/sqrt(n)),  B = 0        so that dW = 0 at the start
    s  = alpha / r,  or  alpha / sqrt(r)  with `rslora`       (Kalajdzievski 2023, arXiv:2312.03732)

With alpha / r the update and its gradients shrink as r grows; the square root keeps them of one
size, for ranks above about 32. LoRA+ (Hayou et al., ICML 2024, arXiv:2402.12354) trains B at
`lr_ratio` times the rate of A.

Departs from the paper, as the authors' code does: A is drawn uniformly, not from a Gaussian.
"""

from collections.abc import Mapping
from typing import Literal, final

from pydantic import PositiveFloat
from torch import Tensor, nn

from lorakit.adapter import (
    Adapter,
    Factors,
    Plan,
    Variant,
    VariantConfig,
    plain_parameters,
    thin,
)


class LoRAConfig(VariantConfig):
    """LoRA, with the scale of rsLoRA and the learning rates of LoRA+ on request."""

    variant: Literal["lora"]
    rslora: bool = False
    """s = alpha / sqrt(rank) in place of alpha / rank."""
    lr_ratio: PositiveFloat = 1.0
    """LoRA+: the learning rate of B over that of A."""

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@final
class LoRALinear(Adapter):
    """dW = s B A."""

    def __init__(self, base: nn.Module, config: LoRAConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        self.A, self.B = plain_parameters(base, plan)
        self.lr_ratio = config.lr_ratio

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return thin(x, self.A, self.scale * self.B, y)

    def factors(self) -> Factors:
        return Factors(self.A.detach(), self.scale * self.B.detach())

    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"B": {"lr_scale": self.lr_ratio}}


VARIANT = Variant(LoRAConfig, LoRALinear)

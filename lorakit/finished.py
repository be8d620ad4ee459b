"""Linears whose update is finished, whatever learned it: a plain pair, or codes."""

from typing import final

from torch import Tensor, nn

from lorakit.adapter import Adapter, Factors, Plan, VariantConfig, thin
from lorakit.codes import Coded, CodedPair, Grids, coded_base, coded_update, gridded


@final
class PlainLinear(Adapter):
    """dW = B A, whatever learned it."""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, config: VariantConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        assert plan.start is not None
        self.register_buffer("A", plan.start.A)
        self.register_buffer("B", plan.start.B)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return thin(x, self.A, self.B, y)

    def factors(self) -> Factors:
        return Factors(self.A, self.B)


@final
class PackedLinear(Adapter):
    """A linear and its codes, whatever learned them."""

    def __init__(self, base: nn.Module, config: VariantConfig, plan: Plan, pair: CodedPair) -> None:
        super().__init__(base, config, plan)
        self.pair = pair
        for name, part in pair.parts().items():  # as buffers they move with the model
            self.register_buffer(f"{name}_codes", part.codes)
            self.register_buffer(f"{name}_step", part.step)
        for name, grid in pair.grids.present().items():
            self.register_buffer(f"{name}_bound", grid.bound)

    def coded(self) -> CodedPair:
        parts = {
            name: Coded(getattr(self, f"{name}_codes"), getattr(self, f"{name}_step"), part.bits)
            for name, part in self.pair.parts().items()
        }
        grids = {
            name: grid._replace(bound=getattr(self, f"{name}_bound"))
            for name, grid in self.pair.grids.present().items()
        }
        E = parts.get("E")
        return CodedPair(parts["A"], E, parts["B"], self.pair.scale, Grids(**grids))

    def base_output(self, x: Tensor) -> Tensor:
        return coded_base(x, self.base, self.coded().grids)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return coded_update(x, self.coded(), y)

    def finish(self, y: Tensor) -> Tensor:
        return gridded(y, self.coded().grids.total)

    def factors(self) -> Factors:
        return Factors(*self.coded().plain())

    def rank(self) -> int:
        return self.pair.rank

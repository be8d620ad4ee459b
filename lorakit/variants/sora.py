"""SoRA: sparse low-rank adaptation (Ding et al., EMNLP 2023, arXiv:2311.11696).

    dW = s B diag(g) A                        a gate g_i on every rank-one term
    g <- T_xi(g - eta grad_g L)               proximal step on  L + lambda |g|_1
    T_xi(u) = sign(u) max(|u| - xi, 0)        soft threshold,  xi_t = eta_t lambda

A gate that lands on exactly 0 takes one row of A and one column of B with it and changes nothing
else, so r is a ceiling and the live rank k is learned. A, B and g are moved by the optimizer
itself; only T is ours. eta_t is the rate of the gates' own group at that step, and gates have no
weight decay. A dead gate still has a gradient, so it may come back.

The optimizer is Adam, which divides each gate's gradient by its size: a steady gradient moves a
gate by eta_t however weak it is, and T takes eta_t lambda back. So lambda here is not the
objective's lambda: a gate dies while its gradient is less steady than lambda asks for, and above
1 only a gate whose moment estimates outrun Adam's own bound can grow. What decides is how long
T is at work: a gate at 1 without gradient needs a sum of eta_t lambda of 1 to die.

Departs from the authors' code, which applies T by three masked edits in place and so sends all of
xi < |u| < 2 xi to 0 as well; whose threshold is a constant (`xi` here) that does not follow the
rate; and which puts an L1 term into the loss besides. Its gates start normal, ours at 1, as LoRA.
"""

from collections.abc import Mapping
from math import exp, log
from typing import Any, Literal, final

import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from torch import Tensor, nn

from lorakit.adapter import (
    Adapter,
    Controller,
    Factors,
    Kept,
    Plan,
    Step,
    Variant,
    VariantConfig,
    plain_parameters,
    thin,
)
from lorakit.schema import Section

Schedule = Literal["constant", "linear", "log-linear", "exp-linear"]


class Sparsity(Section):
    """How hard gates are pushed towards 0."""

    lam: NonNegativeFloat | None = Field(2.0, alias="lambda")
    """The threshold is xi_t = eta_t lambda, with eta_t the gates' rate at step t; 0 leaves a gated
    LoRA. Under Adam a different scale from the objective's lambda: docs/methods.md."""
    xi: NonNegativeFloat | None = Field(None, validate_default=True)
    """A constant threshold for each step, whatever the rate; instead of `lambda`."""
    gate_lr: PositiveFloat = 1e-2
    """The gates' peak learning rate; it follows the run's schedule."""
    gate_init: Literal["ones", "normal"] = "ones"
    """Gates start at 1, so that SoRA starts as LoRA, or as standard normals, as the authors' do."""
    schedule: Schedule = "constant"
    """How `lambda` or `xi` grows from `start` over the run: at once, or in `levels` equal stages of
    equal steps, of equal steps of its exponential (log-linear), or of equal ratios (exp-linear)."""
    start: NonNegativeFloat = Field(0.0, validate_default=True)
    """Where a growing schedule begins; above 0 for exp-linear."""
    levels: PositiveInt = 7
    """How many values a growing schedule takes, both ends among them."""

    @model_validator(mode="before")
    @classmethod
    def _xi_replaces_lambda(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("xi") is not None and "lambda" not in given:
            return {**given, "lambda": None}
        return given

    @field_validator("xi")
    @classmethod
    def _one_strength(cls, xi: float | None, others: ValidationInfo) -> float | None:
        if "lam" in others.data and (others.data["lam"] is None) == (xi is None):
            raise ValueError("give `lambda` or `xi`, one of them")
        return xi

    @field_validator("start")
    @classmethod
    def _below_the_end(cls, start: float, others: ValidationInfo) -> float:
        schedule, given = others.data.get("schedule"), (others.data.get(k) for k in ("lam", "xi"))
        end = next((value for value in given if value is not None), None)
        if schedule == "exp-linear" and start == 0:
            raise ValueError("exp-linear grows by a ratio, so `start` must be above 0")
        if schedule != "constant" and end is not None and start > end:
            raise ValueError(f"start ({start:g}) is above the end ({end:g})")
        return start

    @field_validator("levels")
    @classmethod
    def _enough_to_grow(cls, levels: int, others: ValidationInfo) -> int:
        if others.data.get("schedule") != "constant" and levels < 2:
            raise ValueError("a growing schedule takes at least 2 levels")
        return levels

    @property
    def strength(self) -> float:
        """The end value of whichever of `lambda` and `xi` is given."""
        value = self.lam if self.xi is None else self.xi
        assert value is not None
        return value

    def values(self) -> list[float]:
        """The schedule's values in order, the last of them `strength` (Algorithm 1's xi list)."""
        a, b, count = self.start, self.strength, self.levels
        if self.schedule == "constant":
            return [b]
        grid = [i / (count - 1) for i in range(count)]  # 0 to 1
        match self.schedule:
            case "linear":
                return [a + (b - a) * u for u in grid]
            case "log-linear":  # log((1 - u) e^a + u e^b), without overflow
                return [a, *(b + log(u + (1 - u) * exp(a - b)) for u in grid[1:])]
            case "exp-linear":
                return [a * (b / a) ** u for u in grid]


class SoRAConfig(VariantConfig):
    """SoRA."""

    variant: Literal["sora"]
    sparsity: Sparsity = Sparsity()


def soft_threshold(u: Tensor, xi: float) -> Tensor:
    """T_xi(u), the proximal map of xi |.|_1, element by element."""
    return u.sign() * (u.abs() - xi).clamp_min(0.0)


@final
class SoRALinear(Adapter):
    """dW = s B diag(g) A."""

    def __init__(self, base: nn.Module, config: SoRAConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        self.A, self.B = plain_parameters(base, plan)
        self.g = nn.Parameter(torch.ones(plan.rank, device=self.A.device))
        if config.sparsity.gate_init == "normal" and plan.start is None:
            nn.init.normal_(self.g)
        self.gate_lr = config.sparsity.gate_lr

    def update(self, x: Tensor) -> Tensor:
        return thin(x, self.A, self.scale * self.g * self.B)  # gates on (m, r), not on (..., r)

    def factors(self) -> Factors:
        live = self.g.detach() != 0  # (r,)
        return Factors(self.A.detach()[live], (self.scale * self.g * self.B).detach()[:, live])

    def rank(self) -> int:
        return int(self.g.detach().count_nonzero())

    def optim(self) -> Mapping[str, Mapping[str, float]]:
        return {"g": {"lr": self.gate_lr, "weight_decay": 0.0}}  # lambda already shrinks it


class ProximalGates(Controller[SoRALinear, SoRAConfig]):
    """Applies T_xi to every gate after the optimizer's step, and sees when gates come to rest."""

    def __init__(self, layers: Mapping[str, SoRALinear], config: SoRAConfig, steps: int) -> None:
        super().__init__(layers, config, steps)
        self.values = config.sparsity.values()
        self.live = self._live()
        self.step = self.moved = 0  # now, and the last step at which a gate died or came back

    @torch.no_grad()
    def after_step(self, ctx: Step) -> Kept:
        value = self.values[(ctx.step - 1) * len(self.values) // ctx.steps]
        for layer in self.layers.values():
            xi = value * ctx.rate(layer.g) if self.config.sparsity.xi is None else value
            layer.g.copy_(soft_threshold(layer.g, xi))
        live, self.step = self._live(), ctx.step
        if not torch.equal(live, self.live):
            self.live, self.moved = live, ctx.step
        return {}

    def settled(self) -> bool:
        """Gates have died, and for a tenth of the run none has died or come back.

        Before the first one dies ranks only seem at rest, unless nothing pushes them to 0.
        """
        at_work = self.config.sparsity.strength > 0
        quiet = self.step - self.moved >= max(1, self.steps // 10)
        return not at_work or (self.moved > 0 and quiet)

    def _live(self) -> Tensor:
        """Which gates are not 0, over all layers."""
        return torch.cat([layer.g.detach() != 0 for layer in self.layers.values()])

    def state_dict(self) -> dict[str, Tensor]:
        return {"live": self.live, "steps": torch.tensor([self.step, self.moved])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.live = state["live"].to(self.live.device)
        self.step, self.moved = state["steps"].tolist()


VARIANT = Variant(SoRAConfig, SoRALinear, ProximalGates)

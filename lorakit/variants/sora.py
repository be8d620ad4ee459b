"""SoRA: sparse low-rank adaptation (Ding et al., EMNLP 2023, arXiv:2311.11696).

    dW = s B diag(g) A                        a gate g_i on every rank-one term
    g <- T_xi(g - eta grad_g L)               proximal step on  L + lambda |g|_1
    T_xi(u) = sign(u) max(|u| - xi, 0)        soft threshold,  xi_t = eta_t lambda

A gate that lands on exactly 0 takes one row of A and one column of B with it and changes nothing
else, so r is a ceiling and the live rank k is learned. A, B and g are moved by the optimizer
itself; only T is ours. eta_t is the rate of the gates' own group at that step, and gates have no
weight decay. A dead gate still has a gradient, so it may come back, unless `revive` is false.

The optimizer is Adam, which divides each gate's gradient by its size: a steady gradient moves a
gate by eta_t however weak it is, and T takes eta_t lambda back. So lambda here is not the
objective's lambda: a gate dies while its gradient is less steady than lambda asks for, and above
1 only a gate whose moment estimates outrun Adam's own bound can grow. What decides is how long
T is at work: a gate at 1 without gradient needs a sum of eta_t lambda of 1 to die. With `metric:
adam` T is the proximal map in Adam's own metric, xi_t = eta_t lambda / (sqrt(v_hat) + eps), and
lambda is the objective's.

A sparsifying scheduler (Algorithm 1) gives each xi of a growing list a stage of its own.

With `keep`, xi is found instead of given: see `GatesToTarget`.

Departs from the authors' code, which applies T by three masked edits in place and so sends all of
xi < |u| < 2 xi to 0 as well; whose threshold is a constant (`xi` here) that does not follow the
rate; and which puts an L1 term into the loss besides: `mode: reference` does as it does. Its gates
start normal, ours at 1, as LoRA. Its stages but the first run at rate 0 (`retrain: false`).

Departs from the paper with `keep`, which is ours: thresholds are found, and ranks are turned into
principal axes before they die (`basis: own` leaves them).
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, nn

from lorakit.adapter import (
    Adapter,
    Controller,
    Factors,
    Kept,
    Plan,
    Stage,
    Step,
    Variant,
    VariantConfig,
    plain_parameters,
    thin,
)
from lorakit.linalg import ThinSVD, product_svd
from lorakit.sparsity import Sparsity
from lorakit.target import Target

EPS = 1e-8
"""Adam's, as `torch.optim.AdamW` has it."""
FADE = 0.1
"""With `keep`, the share of the run in which a gate that is to die is led to 0."""
OUTGROWN = 0.25
"""A layer is compacted once so much of it is dead: seldom, and never for a rank or two of many."""


class SoRAConfig(VariantConfig):
    """SoRA."""

    variant: Literal["sora"]
    sparsity: Sparsity = Sparsity()


def soft_threshold(u: Tensor, xi: Tensor | float) -> Tensor:
    """T_xi(u), the proximal map of xi |.|_1, element by element."""
    return u.sign() * (u.abs() - xi).clamp_min(0.0)


def reference_threshold(u: Tensor, xi: Tensor | float) -> Tensor:
    """The authors' in place of T: u - xi sign(u) where |u| is 2 xi or more, 0 below."""
    return torch.where(u.abs() >= 2 * xi, u - xi * u.sign(), 0.0)


@final
class SoRALinear(Adapter):
    """dW = s B diag(g) A."""

    ranked: ClassVar[Mapping[str, int]] = {"A": 0, "B": 1, "g": 0}

    def __init__(self, base: nn.Module, config: SoRAConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        self.A, self.B = plain_parameters(base, plan)
        self.g = nn.Parameter(torch.ones(plan.rank, device=self.A.device))
        if config.sparsity.gate_init == "normal" and plan.start is None:
            nn.init.normal_(self.g)
        self.gate_lr = config.sparsity.gate_lr

    def principal(self) -> ThinSVD:
        """The SVD of B diag(g) A."""
        return product_svd(self.A.detach(), (self.g * self.B).detach())

    @torch.no_grad()
    def turn(self, svd: ThinSVD, unit: Tensor) -> None:
        """Rewrites B diag(g) A as its SVD, U S Vh, with gates S / `unit`; dW stays."""
        self.A.copy_(unit.sqrt() * svd.Vh)
        self.B.copy_(unit.sqrt() * svd.U)
        self.g.copy_(svd.S / unit)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return thin(x, self.A, self.scale * self.g * self.B, y)  # gates on (m, r), not on (rows, r)

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
        self.sparsity = config.sparsity
        self.values, self.lengths = self.sparsity.values(), self.sparsity.lengths(steps)
        self.gates = sum(layer.r for layer in layers.values())  # those of compacted ranks as well
        self.operator = OPERATORS[self.sparsity.mode]
        self.live = self._live()
        self.step = self.moved = 0  # now, and the last step at which a gate died or came back
        self.pushed = torch.zeros(())  # the mean threshold of this step

    def stages(self) -> tuple[Stage, ...]:
        behind = 1.0 if self.sparsity.retrain else 0.0
        return tuple(Stage(n, behind if i else 1.0) for i, n in enumerate(self.lengths))

    def penalty(self) -> Tensor | None:
        """l1 times the mean of |g| over all gates, dead ones among them."""
        if not self.sparsity.l1:
            return None
        return self.sparsity.l1 / self.gates * self._gates().abs().sum()

    def before_step(self, ctx: Step) -> None:
        """Takes the gradients of gates that stay dead out of the norm that is clipped."""
        self.pushed = torch.zeros(())  # until the step is taken
        if not self.sparsity.revive:
            for layer, live in self._by_layer(self.live):
                if layer.g.grad is not None:
                    layer.g.grad.mul_(live)

    @torch.no_grad()
    def after_step(self, ctx: Step) -> Kept:
        gates, xi = self._gates(), self.thresholds(ctx)
        if not self.sparsity.revive:
            gates = gates * self.live  # the optimizer's momentum moves dead gates too
        gates = self.operator(gates, xi)
        for layer, own in self._by_layer(gates):
            layer.g.copy_(own)
        live, self.step, self.pushed = gates != 0, ctx.step, xi.mean()
        if not torch.equal(live, self.live):
            self.live, self.moved = live, ctx.step
        return self._outgrown() if self.sparsity.compact else {}

    def thresholds(self, ctx: Step) -> Tensor:
        """xi of every gate, over all layers."""
        value, given = self.values[ctx.stage], self.sparsity
        if given.xi is not None:
            return torch.full_like(self._gates(), value)
        xi = []
        for layer in self.layers.values():
            own = torch.full_like(layer.g, value * ctx.rate(layer.g))
            if given.metric == "adam":
                v_hat = ctx.moment(layer.g)
                own = torch.where(v_hat >= given.floor, own / (v_hat.sqrt() + EPS), 0.0)
            xi.append(own)
        return torch.cat(xi)

    def compacts(self) -> bool:
        return self.sparsity.compact

    def settled(self) -> bool:
        """Gates have died, and for a tenth of the run none has died or come back.

        Before the first one dies ranks only seem at rest, unless nothing pushes them to 0.
        """
        at_work = self.sparsity.strength > 0
        quiet = self.step - self.moved >= max(1, self.steps // 10)
        return not at_work or (self.moved > 0 and quiet)

    def told(self) -> Mapping[str, float]:
        """The mean threshold."""
        return {"xi": float(f"{float(self.pushed):.3g}")}

    def ended(self) -> tuple[str, ...]:
        if self.sparsity.strength == 0 or self.moved:
            return ()
        return ("no rank has died; push more (adapter.sparsity), or say how many: `keep`.",)

    def _outgrown(self) -> Kept:
        """The layers in which many ranks are dead, with those that live; they count as gone."""
        kept, rows = {}, []
        for name, live in zip(self.layers, self._split(self.live), strict=True):
            if (~live).sum() >= max(1, OUTGROWN * len(live)):
                kept[name] = live.nonzero().flatten()
            rows.append(live[live] if name in kept else live)
        self.live = torch.cat(rows)
        return kept

    def _gates(self) -> Tensor:
        return torch.cat([layer.g for layer in self.layers.values()])

    def _live(self) -> Tensor:
        """Which gates are not 0, over all layers."""
        return self._gates().detach() != 0

    def _split(self, values: Tensor) -> tuple[Tensor, ...]:
        return torch.split(values, [len(layer.g) for layer in self.layers.values()])

    def _by_layer(self, values: Tensor) -> Iterator[tuple[SoRALinear, Tensor]]:
        return zip(self.layers.values(), self._split(values), strict=True)

    def state_dict(self) -> dict[str, Tensor]:
        return {"live": self.live, "steps": torch.tensor([self.step, self.moved])}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.live = state["live"].to(self.live.device)
        self.step, self.moved = state["steps"].tolist()


class GatesToTarget(ProximalGates):
    """Finds every gate's own xi, so that a share of the ranks is left, whatever the run's length.

    The proximal step is that of the trimmed lasso, the l1 norm of all but the largest gates
    (Bertsimas, Copenhaver and Mazumder 2017, arXiv:1708.04527): what is to stay is not shrunk. A
    gate in line to die has xi = |u| / (d + 1), d the steps it has to go, and so comes to 0 evenly
    where no gradient moves it. Then dead gates stay dead, and nothing pushes the others.

    When the first is due, every layer is turned into its principal axes, by the SVD of
    B diag(g) A, with gates in proportion to singular values. Ranks as they were trained share the
    same few directions, and each that dies takes a part of all of them along; principal axes can
    be parted with. Where nothing were learnt on the way, this would leave what truncating the
    finished update leaves (`lorakit prune --keep`). With `basis: own` ranks stay as they are: gates
    start equal there and Adam moves each by eta_t times the steadiness of its gradient, so |g| is
    the sum of what the loss has asked for. |g| |A_i| |B_i|, the size of the update, and
    |g| sqrt(v_hat), what the loss feels of it by Fisher's information, chose worse when tried.
    """

    def __init__(self, layers: Mapping[str, SoRALinear], config: SoRAConfig, steps: int) -> None:
        super().__init__(layers, config, steps)
        assert self.sparsity.keep is not None
        cost = torch.cat([self._cost(layer).expand(layer.r) for layer in layers.values()])
        self.target = Target.of(cost, self.sparsity.keep, steps)
        self.met = 0  # the step at which it was
        asked = f"adapter.sparsity.keep: {self.sparsity.keep:g}"
        self.target.refuse_haste(2, asked, self.gates)  # in the first, no gate has a gradient yet

    def after_step(self, ctx: Step) -> Kept:
        now = self.step < self.target.first <= ctx.step  # or later, if that step was left out
        if now and self.sparsity.basis == "principal":
            self._turn(ctx)
        return super().after_step(ctx)

    def _turn(self, ctx: Step) -> None:
        """Turns every layer into its principal axes; of all gates together the mean is 1."""
        svds = [layer.principal() for layer in self.layers.values()]
        unit = torch.cat([svd.S for svd in svds]).mean()
        if not unit:  # nothing has been learnt
            return
        for layer, svd in zip(self.layers.values(), svds, strict=True):
            layer.turn(svd, unit)
            for rewritten in (layer.A, layer.B, layer.g):
                ctx.forget(rewritten)

    def thresholds(self, ctx: Step) -> Tensor:
        u, xi = self._gates(), torch.zeros_like(self.live, dtype=torch.float32)
        if self.met or ctx.step < self.target.first:
            return xi
        cost = torch.cat([self._cost(layer).expand(len(layer.g)) for layer in self.layers.values()])
        live, size = self.live, u.abs()
        due = self.target.due(size[live], cost[live], ctx.step)
        xi[live] = torch.where(due < FADE * self.steps, size[live] / (due + 1), 0.0)
        self.met = 0 if due.isfinite().any() else ctx.step
        return xi

    def settled(self) -> bool:
        """The target is met: no gate will die any more."""
        return self.met > 0

    def rewrote(self) -> bool:
        return self.sparsity.basis == "principal" and self.step == self.target.first

    def _cost(self, layer: SoRALinear) -> Tensor:
        """Of one rank, in the unit of the target."""
        cost = 1 if self.sparsity.of == "ranks" else layer.n + layer.m
        return torch.tensor([cost], dtype=torch.float64, device=layer.g.device)

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), "met": torch.tensor(self.met)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.met = int(state["met"])


def controller(layers: Mapping[str, SoRALinear], config: SoRAConfig, steps: int) -> ProximalGates:
    """One that pushes as told, or one that finds out how hard."""
    kind = ProximalGates if config.sparsity.keep is None else GatesToTarget
    return kind(layers, config, steps)


OPERATORS = {"prox": soft_threshold, "reference": reference_threshold}
VARIANT = Variant(SoRAConfig, SoRALinear, controller)

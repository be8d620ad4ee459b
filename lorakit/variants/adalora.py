"""AdaLoRA: adaptive budget allocation (Zhang et al., ICLR 2023, arXiv:2303.10512).

    dW = s B diag(E) A,   E = 0,   A, B ~ N(0, 0.02^2)      P Lambda Q of the paper: an SVD, with
    L + gamma mean_X |X X^T - I|_F,   X every A and B^T     rows of A and columns of B kept
                                                            orthonormal by a penalty
    I = |w grad_w|                                          sensitivity, of every number w
    I~ <- b1 I~ + (1 - b1) I                                smoothed
    U~ <- b2 U~ + (1 - b2) |I - I~|                         its uncertainty
    s(w) = I~ U~,   S_i = s(E_i) + mean_j s(B_ji) + mean_j s(A_ij)           (eqs. 9 to 13)
    b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3     for t_i < t <= T - t_f

Every `interval` steps of the middle phase all but the b(t) triplets of highest S, over all layers
together, have their E_i set to 0. Rows of A and columns of B stay, and the optimizer moves E_i on,
so a triplet may come back until the next allocation. From T - t_f on the mask is final: scores are
frozen, and E is masked again after every step. s is alpha over the start rank, and stays.

S is taken after the optimizer's step: new weights, and the gradients that moved them, the
penalty's part and clipping included. Moments start at 0 and are not corrected for it.

Departs from the paper as the authors' code does (QingruZhang/AdaLoRA, loralib/adalora.py): its
eq. 14 has t - t_i - t_f above the fraction, which gives more than b_0 at t_i and more than b_T at
T - t_f; its penalty is a sum of squared norms, and the gammas of its tables go with the mean of
plain ones; its Algorithm 1 scores the weights before the step.

Departs from the authors' code: ties at the threshold are cut by position, so that exactly b(t)
stay, where `<=` drops them all; the last allocation falls on T - t_f itself, as in PEFT, not on the
step after it; E has no weight decay, as no vector has here.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, final

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator
from pydantic import ValidationInfo as Info
from torch import Tensor, nn
from torch.linalg import vector_norm

from lorakit.adapter import (
    Adapter,
    Controller,
    Factors,
    Kept,
    Plan,
    Step,
    Variant,
    VariantConfig,
    thin,
)
from lorakit.base import device_of
from lorakit.errors import LorakitError, RecipeError, several
from lorakit.linalg import product_svd
from lorakit.schema import Section, refuse_below

Phase = Annotated[float, Field(ge=0.0, lt=1.0)] | PositiveInt
"""A share of the run's steps, or a number of steps."""


class Budget(Section):
    """How many ranks stay, over all linears together, and when the others go."""

    target: PositiveFloat | None = None
    """Ranks a linear keeps in the mean, 2 or 1.5: b_T is this times the number of linears. null:
    two thirds of the start ranks, the paper's proportion."""
    warmup: Phase = 0.15
    """A share of the run, below 1, or a number of steps: t_i, in which nothing is pruned. The
    paper's runs on GLUE have 9 to 18 %."""
    final: Phase = Field(0.5, validate_default=True)
    """A share of the run, below 1, or a number of steps: t_f, at the end, in which ranks rest. The
    paper's runs on GLUE have 44 to 58 %."""
    interval: Annotated[float, Field(gt=0.0, lt=1.0)] | PositiveInt = 0.01
    """A share of the run, above 0 and below 1, or a number of steps: Delta T, between two
    allocations. At 1 step few of the ranks that went come back."""
    beta1: float = Field(0.85, gt=0.0, lt=1.0)
    """Smoothing of the sensitivity: the weight of the past."""
    beta2: float = Field(0.85, gt=0.0, lt=1.0)
    """Smoothing of its uncertainty."""

    @field_validator("final")
    @classmethod
    def _room_between(cls, final: float, others: Info) -> float:
        warmup = others.data.get("warmup")
        if isinstance(warmup, float) and isinstance(final, float) and warmup + final >= 1:
            raise ValueError(
                f"warmup ({warmup:g}) and final ({final:g}) leave nothing between; together they "
                "are expected to be below 1"
            )
        return final


class AdaLoRAConfig(VariantConfig):
    """AdaLoRA."""

    variant: Literal["adalora"]
    budget: Budget = Budget()
    orthogonality: NonNegativeFloat = 0.1
    """gamma, the weight of the penalty that keeps A's rows and B's columns orthonormal."""

    @field_validator("budget")
    @classmethod
    def _below_the_start(cls, budget: Budget, others: Info) -> Budget:
        own = any(others.data.get(key) for key in ("ranks", "init_from", "ranks_from"))
        rank, target = others.data.get("rank"), budget.target
        if not own and rank is not None and target is not None and target >= rank:
            why = f"expected less than the start rank, {rank}: else there is nothing to prune"
            refuse_below({"target": why}, budget)
        return budget


def cubic(start: int, end: int, done: float) -> int:
    """b(t), which falls from `start` to `end`, fast at first, as `done` goes from 0 to 1."""
    return int(end + (start - end) * (1 - done) ** 3)


def smooth(
    sensitivity: Tensor, uncertainty: Tensor, now: Tensor, beta1: float, beta2: float
) -> None:
    """Moves I~ and U~ in place by I (`now`), U~ with the I~ just moved; all of one shape."""
    sensitivity.lerp_(now, 1 - beta1)
    uncertainty.lerp_((now - sensitivity).abs_(), 1 - beta2)


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Which `count` of scores (b,) are highest, as booleans (b,); of equals the first."""
    order = scores.sort(descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, order[:count], True)


class Schedule(NamedTuple):
    """When ranks are allocated, and how many."""

    first: int
    """t_i: the last step without pruning."""
    last: int
    """T - t_f: the step of the last allocation."""
    interval: int
    start: int
    """b_0, the ranks of all linears."""
    end: int
    """b_T."""

    def budget(self, t: int) -> int:
        """b(t)."""
        done = (t - self.first) / (self.last - self.first)
        return cubic(self.start, self.end, min(max(done, 0.0), 1.0))

    def due(self, t: int) -> bool:
        """Whether step t ends with an allocation."""
        return t == self.last or (self.first < t < self.last and t % self.interval == 0)


def schedule(budget: Budget, start: int, linears: int, steps: int) -> Schedule:
    """The settings in steps and ranks.

    Raises:
        RecipeError: they leave nothing to prune, or no step to do it.

    """
    first, last = _steps(budget.warmup, steps), steps - _steps(budget.final, steps)
    interval = max(1, _steps(budget.interval, steps))
    end = start * 2 // 3 if budget.target is None else round(budget.target * linears)
    faults = []
    if first >= last:
        faults.append(
            f"adapter.budget: {first:,} steps of warmup and {steps - last:,} of final leave none "
            f"of the run's {steps:,} between them."
        )
    elif interval > last - first:
        faults.append(
            f"adapter.budget.interval: {interval:,} steps; expected at most {last - first:,}, "
            f"all there are between warmup and final."
        )
    if not 0 < end < start:
        faults.append(
            f"adapter.budget.target: {end:,} ranks over {linears:,} linears; expected at least 1 "
            f"and fewer than the {start:,} of the start."
        )
    if faults:
        raise RecipeError(several("the budget does not fit the run", faults))
    return Schedule(first, last, interval, start, end)


def _steps(given: float, steps: int) -> int:
    return given if isinstance(given, int) else round(given * steps)


def orthogonality(matrices: list[Tensor]) -> Tensor:
    """The mean of |X X^T - I|_F over the matrices X (r, d), r and d their own.

    At 0 its gradient is 0. Equal shapes are stacked: a few kernels, not a few for every matrix.
    """
    alike: dict[torch.Size, list[Tensor]] = {}
    for X in matrices:
        alike.setdefault(X.shape, []).append(X)
    norms = []
    for (r, _), group in alike.items():
        X = torch.stack(group)  # (count, r, d)
        off = X @ X.mT - torch.eye(r, device=X.device)
        norms.append(vector_norm(off, dim=(1, 2)).sum())
    return torch.stack(norms).sum() / len(matrices)


def triplets(n: int, m: int, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """A (r, n), B (m, r) and E (r,) at the start: fresh, or the SVD of the pair to go on from."""
    if plan.start is None:
        r = plan.rank
        return 0.02 * torch.randn(r, n), 0.02 * torch.randn(m, r), torch.zeros(r)
    U, S, Vh = product_svd(plan.start.A, plan.start.B)
    return Vh.float(), U.float(), S.float() / plan.scale


@final
class AdaLoRALinear(Adapter):
    """dW = s B diag(E) A."""

    live: Tensor
    """(r,), which ranks the last allocation kept."""

    def __init__(self, base: nn.Module, config: AdaLoRAConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        A, B, E = triplets(self.n, self.m, plan)
        self.A, self.B, self.E = (nn.Parameter(X.to(device_of(base))) for X in (A, B, E))
        live = torch.ones(plan.rank, dtype=torch.bool, device=self.E.device)
        self.register_buffer("live", live)

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        return thin(x, self.A, self.scale * self.E * self.B, y)  # E on (m, r), not on (rows, r)

    def present(self) -> Tensor:
        """(r,), which ranks are live: kept, if only just at E = 0, or back since."""
        return self.live | (self.E.detach() != 0)

    def factors(self) -> Factors:
        live = self.present()
        return Factors(self.A.detach()[live], (self.scale * self.E * self.B).detach()[:, live])

    def rank(self) -> int:
        return int(self.present().count_nonzero())


class RankAllocator(Controller[AdaLoRALinear, AdaLoRAConfig]):
    """Scores every rank at every step, and at some masks all but the best, over all layers."""

    def __init__(self, layers: Mapping[str, AdaLoRALinear], config: AdaLoRAConfig, steps: int):
        super().__init__(layers, config, steps)
        start = sum(layer.r for layer in layers.values())
        self.schedule = schedule(config.budget, start, len(layers), steps)
        self.step = 0
        # one vector for the numbers of all layers: a handful of kernels a step
        self.weights = [p for layer in layers.values() for p in (layer.A, layer.B, layer.E)]
        self.sensitivity = torch.zeros_like(_flat(self.weights))  # I~
        self.uncertainty = torch.zeros_like(self.sensitivity)  # U~

    def penalty(self) -> Tensor | None:
        if self.config.orthogonality == 0:
            return None
        matrices = [X for layer in self.layers.values() for X in (layer.A, layer.B.T)]
        return self.config.orthogonality * orthogonality(matrices)

    def before_step(self, ctx: Step) -> None:
        self.step = ctx.step  # of those left out as well: it is no state, then

    @torch.no_grad()
    def after_step(self, ctx: Step) -> Kept:
        if ctx.step < self.schedule.last:
            self._sense()
        if self.schedule.due(ctx.step):
            kept = keep_top(self.scores(), self.schedule.budget(ctx.step))
            sizes = [layer.r for layer in self.layers.values()]
            for layer, live in zip(self.layers.values(), kept.split(sizes), strict=True):
                layer.live.copy_(live)
        if self.schedule.due(ctx.step) or self.settled():
            for layer in self.layers.values():
                layer.E.masked_fill_(~layer.live, 0.0)
        return {}

    def _sense(self) -> None:
        """Takes the step's |w grad_w| into the moments; what the loss does not reach has none."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.weights]
        now = _flat(self.weights).mul_(_flat(grads)).abs_()
        betas = self.config.budget.beta1, self.config.budget.beta2
        smooth(self.sensitivity, self.uncertainty, now, *betas)

    def scores(self) -> Tensor:
        """S, (b_0,): the ranks of all layers, in their order."""
        parts = (self.sensitivity * self.uncertainty).split([p.numel() for p in self.weights])
        s = [part.view_as(p) for part, p in zip(parts, self.weights, strict=True)]
        triplets = zip(s[0::3], s[1::3], s[2::3], strict=True)
        return torch.cat([E + (A.mean(dim=1) + B.mean(dim=0)) for A, B, E in triplets])

    def settled(self) -> bool:
        """The last allocation is done."""
        return self.step >= self.schedule.last

    def told(self) -> Mapping[str, Any]:
        return {"budget": self.schedule.budget(self.step)}

    def ended(self) -> tuple[str, ...]:
        live, start = sum(layer.rank() for layer in self.layers.values()), self.schedule.start
        if live != self.schedule.end:
            raise LorakitError(
                f"AdaLoRA ended with {live:,} of {start:,} ranks where adapter.budget.target asks "
                f"for {self.schedule.end:,}: the run has not come to its last allocation, after "
                f"step {self.schedule.last:,}."
            )
        return ()

    def state_dict(self) -> dict[str, Tensor]:
        return {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.sensitivity.copy_(state["sensitivity"])
        self.uncertainty.copy_(state["uncertainty"])


def _flat(tensors: list[nn.Parameter] | list[Tensor]) -> Tensor:
    """All numbers in one new vector, detached."""
    return torch.cat([t.detach().flatten() for t in tensors])


VARIANT = Variant(AdaLoRAConfig, AdaLoRALinear, RankAllocator)

"""B-LoRA: Bayesian LoRA, learned ranks and bit-widths (Meo et al. 2024, arXiv:2406.13046).

    dW = s Q(B) diag(Q(E) * m) Q(A)         Q as in lorakit/quantizer.py, with 2 to 32 bits
    m = round(1, g_1, g_1 g_2, ...)         rank gates: rank i is on only if all before it are
    L = task + lambda_bits sum_Q sum_b P_4 ... P_b + lambda_ranks sum_layers mean_i P_1 ... P_i

with P = P(gate > 0). Every tensor has four bit gates; E has r - 1 rank gates besides, since the
first rank is never gated. Gates are drawn anew at every forward pass in training and thresholded in
evaluation; rounding m passes gradients straight through. Dead ranks are those whose Q(E) m is 0.

A run has three phases: `warmup`, in which nothing is quantised, and whose last step sets the ranges
to the tensors' own; then gates, noise and penalty; then `freeze`, in which gates stand thresholded.
The gates' rate is matched to the run's length: with no gradient but the penalty's a logit loses
about its rate a step, however weak the penalty is, since Adam divides by its size.

`keep` and `bits` are ours: instead of a penalty, as many gates are closed as they ask for, those
first that the loss asks least for (lorakit/chains.py).

The paper's text was not available; read were its co-author's fork of peft (KseniaSycheva/peft,
6548bad) and another's port (tvergara/sah, b5a5bd6). Departs from them: B starts at 0, E at 1 and A
as LoRA's, so that the start is exact; ranges are set after the warm-up, not at the first forward
pass; the rank penalty follows the product that the gates form; gates and ranges have no weight
decay; s = alpha / r; the bias and the input x are never quantised.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from enum import IntEnum
from functools import partial
from itertools import pairwise
from typing import Any, Literal, final

import torch
from pydantic import ValidationInfo, field_validator
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.nn.functional import linear
from torch.nn.utils.rnn import pad_sequence

from lorakit import quantizer
from lorakit.adapter import (
    Adapter,
    Controller,
    Factors,
    Kept,
    Plan,
    Promises,
    Step,
    Variant,
    VariantConfig,
    plain_parameters,
)
from lorakit.chains import Closing, Tally, stacked
from lorakit.codes import BITS, CodedPair, Grid, Grids, coded_base, coded_update, gridded
from lorakit.errors import RecipeError
from lorakit.gates import Gates, Quantize, closed, unmoved
from lorakit.schema import refuse_below

INNER = ("A", "E", "B")
ACTIVATIONS = ("base", "down", "inner", "up", "total")  # as in codes.Grids
UNSET = 80.0
"""log of a range that is wider than any tensor."""
SMALLEST = 1e-8
"""Of ranges: a tensor of zeros has one too."""
MATCH = 4.0
"""How often a gate could close in its phase at its peak rate: one that nothing holds is closed
after a fifth to a third of it."""


class BLoRAConfig(VariantConfig):
    """B-LoRA."""

    variant: Literal["blora"]
    gates: Gates = Gates()
    quantize: Quantize = Quantize()

    @field_validator("quantize")
    @classmethod
    def _what_bits_count(cls, quantize: Quantize, others: ValidationInfo) -> Quantize:
        bits = getattr(others.data.get("gates"), "bits", None)
        why = (
            "`gates.bits` counts the adapter's numbers alone; with more to quantise give "
            "`gates.lambda_bits`"
        )
        if bits is not None:
            more = [key for key in ("weights", "activations") if getattr(quantize, key)]
            refuse_below(dict.fromkeys(more, why), quantize)
        return quantize


class Phase(IntEnum):
    """Of a run."""

    DENSE = 0
    GATED = 1
    FROZEN = 2


IDLE = {
    Phase.DENSE: ("bit_logits", "rank_logits", "log_ranges"),
    Phase.GATED: (),
    Phase.FROZEN: ("bit_logits", "rank_logits"),
}
"""What stands still in a phase."""


@final
class BLoRALinear(Adapter):
    """dW = s Q(B) diag(Q(E) * m) Q(A)."""

    def __init__(self, base: nn.Module, config: BLoRAConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        if config.quantize.weights and not base.weight.is_floating_point():  # type: ignore[operator]
            raise RecipeError(
                "adapter.quantize.weights: the base's weights are in codes already; leave it "
                "off, or load the base unquantised."
            )
        self.A, self.B = plain_parameters(base, plan)
        device, quantize = self.A.device, config.quantize
        self.E = nn.Parameter(torch.ones(plan.rank, device=device))
        self.quantised = INNER + ("weight",) * quantize.weights + ACTIVATIONS * quantize.activations
        init, q = config.gates.gate_init, len(self.quantised)
        self.bit_logits = nn.Parameter(torch.full((q, len(BITS) - 1), init, device=device))
        self.rank_logits = nn.Parameter(torch.full((plan.rank - 1,), init, device=device))
        self.log_ranges = nn.Parameter(torch.full((q,), UNSET, device=device))
        self.phase: Tensor
        self.peaks: Tensor
        self.register_buffer("phase", torch.tensor(Phase.DENSE, device=device))
        if quantize.activations:
            self.register_buffer("peaks", torch.zeros(len(ACTIVATIONS), device=device))
        self.gate_lr, self.range_lr = config.gates.gate_lr or 0.0, config.gates.range_lr

    # training: quantisers as they are drawn; evaluation: codes

    def base_output(self, x: Tensor) -> Tensor:
        if not self.training:
            return coded_base(x, self.base, self._outer())
        if "weight" not in self.quantised or self.phase == Phase.DENSE:
            return self._activation("base", self.base(x))
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        q = self._quantised("weight", weight)
        return self._activation("base", functional_call(self.base, {"weight": q}, (x,)))

    def update(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.training:
            return coded_update(x, self.coded(), y)
        A, E, B = self._drawn()
        B = self.scale * B
        h = self._activation("down", linear(x, A.to(x.dtype)))
        if "inner" in self.quantised:
            h = self._activation("inner", h * E.to(x.dtype))
        else:
            B = B * E  # on (m, r), not on (rows, r)
        B = B.to(x.dtype)
        if "up" in self.quantised:
            return y + self._activation("up", linear(h, B))
        return torch.addmm(y, h, B.t())

    def finish(self, y: Tensor) -> Tensor:
        return self._activation("total", y) if self.training else gridded(y, self._outer().total)

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, E and B in this forward pass: as they are, or Q(A), Q(E) * m and Q(B)."""
        phase = Phase(int(self.phase))  # on a GPU this waits for the device
        idle = [getattr(self, name).sum() for name in IDLE[phase]]
        zero = 0.0 * torch.stack(idle).sum() if idle else 0.0  # so that each has its gradient
        if phase == Phase.DENSE:
            return self.A, self.E + zero, self.B
        shares = self._shares(slice(len(INNER))).unbind()
        ranges = self.log_ranges[: len(INNER)].unbind()
        A, E, B = map(quantizer.ladder, (self.A, self.E, self.B), ranges, shares)
        return A, E * self._mask() + zero, B

    def _gates(self, phi: Tensor) -> Tensor:
        """Drawn at every call; thresholded once they stand."""
        frozen = self.phase == Phase.FROZEN
        return quantizer.is_open(phi).float() if frozen else quantizer.sample(phi)

    def _shares(self, rows: slice) -> Tensor:
        """What each width has in the quantisers of `rows`, (q, 5)."""
        return quantizer.shares(self._gates(self.bit_logits[rows]))

    def _mask(self) -> Tensor:
        """m, (r,): 1 and then 0, with the gradient of the product."""
        product = nn.functional.pad(self._gates(self.rank_logits), (1, 0), value=1.0).cumprod(0)
        return product + (product.round() - product).detach()

    def _quantised(self, name: str, x: Tensor) -> Tensor:
        """Q(x) of one of the outer quantisers, in the precision of x."""
        i = self.quantised.index(name)
        (shares,) = self._shares(slice(i, i + 1))
        return quantizer.ladder(x.float(), self.log_ranges[i], shares).to(x.dtype)

    def _activation(self, name: str, x: Tensor) -> Tensor:
        """Q(x) where activations are quantised; before, its largest value is remembered."""
        if name not in self.quantised:
            return x
        if self.phase != Phase.DENSE:
            return self._quantised(name, x)
        peak = self.peaks[ACTIVATIONS.index(name)]
        peak.copy_(torch.maximum(peak, x.detach().abs().max()))
        return x

    @torch.no_grad()
    def calibrate(self) -> None:
        """Sets every range to the largest value there is now, and so ends the dense phase."""
        sizes = [getattr(self, name).abs().max() for name in INNER]
        if "weight" in self.quantised:
            sizes.append(self.base.weight.abs().max())  # type: ignore[operator]
        if len(self.quantised) > len(sizes):
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(self.peaks, distributed.ReduceOp.MAX)  # each saw its rows
            sizes += self.peaks.unbind()
        self.log_ranges.copy_(torch.stack(sizes).clamp_min(SMALLEST).log())
        self.phase.fill_(Phase.GATED)

    # what it comes to

    @torch.no_grad()
    def coded(self) -> CodedPair:
        grids = self._grids()
        E = grids["E"].coded(self.E * self.open_ranks())
        live = E.codes != 0
        A, B = grids["A"].coded(self.A[live]), grids["B"].coded(self.B[:, live])
        return CodedPair(A, E._replace(codes=E.codes[live]), B, self.scale, self._outer())

    def factors(self) -> Factors:
        return Factors(*self.coded().plain())

    def delta(self) -> Tensor:
        """The part of the update that is a matrix: quantised activations are none."""
        A, B = self.coded()._replace(grids=Grids()).plain()
        return B @ A

    def rank(self) -> int:
        return int((self.alive() * self.open_ranks()).sum())

    def alive(self) -> Tensor:
        """The ranks whose E does not round to 0, (r,), whatever their gates are."""
        return self._grids()["E"].coded(self.E).codes != 0

    def bits(self) -> dict[str, int]:
        """The width of every quantised tensor in evaluation, by name."""
        widths = quantizer.bits_of(self.bit_logits.detach())
        return dict(zip(self.quantised, widths, strict=True))

    def open_ranks(self) -> Tensor:
        """The mask m in evaluation, (r,): 1 and then 0."""
        opened = quantizer.is_open(self.rank_logits.detach()).float()
        return nn.functional.pad(opened, (1, 0), value=1.0).cumprod(0)

    def optim(self) -> Mapping[str, Mapping[str, float]]:
        gates = {"lr": self.gate_lr, "weight_decay": 0.0}
        ranges = {"lr": self.range_lr, "weight_decay": 0.0}
        return {"bit_logits": gates, "rank_logits": gates, "log_ranges": ranges}

    def _grids(self) -> dict[str, Grid]:
        """Every quantiser in evaluation, by name."""
        bounds = self.log_ranges.detach().exp().unbind()
        return {
            k: Grid(bound, b) for (k, b), bound in zip(self.bits().items(), bounds, strict=True)
        }

    def _outer(self) -> Grids:
        """The quantisers besides those of A, E and B."""
        names = self.quantised[len(INNER) :]
        if not names:
            return Grids()
        grids = self._grids()
        return Grids(**{name: grids[name] for name in names})


def ranks_left(layers: Iterable[BLoRALinear], keep: float, fresh: bool = False) -> Tally:
    """Of `keep`: the ranks whose E does not round to 0; with `fresh`, as at the start, all."""
    alive = [torch.ones_like(x.E) if fresh else x.alive() for x in layers]
    free = sum(float(own[0]) for own in alive)
    return Tally(stacked([own[1:].double() for own in alive]), free, keep * sum(map(len, alive)))


def bits_left(layers: Iterable[BLoRALinear], bits: float, fresh: bool = False) -> Tally:
    """Of `bits`: those of all numbers in A, E and B, of ranks that live."""
    sizes = [(layer.r if fresh else layer.rank(), layer.n, layer.m) for layer in layers]
    numbers = torch.tensor([[k * n, k, m * k] for k, n, m in sizes], dtype=torch.float64)
    rungs = torch.tensor([wide - narrow for narrow, wide in pairwise(BITS)])
    whole = float(numbers.sum())
    return Tally(numbers.view(-1, 1) * rungs, BITS[0] * whole, bits * whole)


COUNTED = {"keep": ("rank_logits", ranks_left), "bits": ("bit_logits", bits_left)}
"""Targets: the gates they close, and what counts for them."""


class BayesianGates(Controller[BLoRALinear, BLoRAConfig]):
    """The phases of a run, the complexity term, and how gates stand."""

    def __init__(self, layers: Mapping[str, BLoRALinear], config: BLoRAConfig, steps: int) -> None:
        super().__init__(layers, config, steps)
        gates = config.gates
        self.dense = max(1, round(gates.warmup * steps))
        """The last step of the dense phase."""
        self.gated = max(self.dense, steps - round(gates.freeze * steps))
        """The last step at which gates move."""
        self._match_rates(gates.gate_init - quantizer.THRESHOLD, self.gated - self.dense)
        self.closings = self._closings()
        self.opened = self._opened()
        self.step = self.moved = 0  # now, and the last step at which a gate opened or closed

    def _match_rates(self, way: float, phase: int) -> None:
        """Sets the gates' rate by the steps there are for them to go their `way` to the threshold.

        Raises:
            RecipeError: no gate can go so far, or no step is left to them.

        """
        if phase == 0:
            raise RecipeError(
                f"adapter.gates: warmup is {self.dense:,} of the run's {self.steps:,} steps, and "
                "none is left to the gates; train longer, or take less of warmup and freeze."
            )
        given, matched = self.config.gates.gate_lr, MATCH * way / phase
        if given is None:
            for layer in self.layers.values():
                layer.gate_lr = matched
        elif given * phase < way:
            raise RecipeError(
                f"adapter.gates.gate_lr: {given:g}: no gate can close. In the {phase:,} steps of "
                f"their phase gates move by {given * phase:.2g}, and it takes {way:.2f} from "
                f"gate_init. Give null, {matched:.1g}, or a longer run."
            )

    def _closings(self) -> dict[str, Closing]:
        """The way to every target there is."""
        layers, gates, closings = self.layers.values(), self.config.gates, {}
        for target, (logits, count) in COUNTED.items():
            if (asked := getattr(gates, target)) is not None:
                closings[target] = Closing(
                    [getattr(layer, logits) for layer in layers],
                    gates.gate_init,
                    partial(count, layers, asked),
                    f"adapter.gates.{target}: {asked:g}",
                    self.steps,
                    (self.dense + 1, self.gated),
                )
        return closings

    def penalty(self) -> Tensor | None:
        """lambda_bits and lambda_ranks times the expected lengths of their chains."""
        layers, gates = self.layers.values(), self.config.gates
        if self._phase() != Phase.GATED:
            return None
        bits = quantizer.chain(torch.stack([layer.bit_logits for layer in layers])).sum()
        # ranks differ between layers; a gate that is never on adds nothing to a chain
        logits: list[Tensor] = [layer.rank_logits for layer in layers]
        lengths = quantizer.chain(pad_sequence(logits, batch_first=True, padding_value=-100.0))
        ranks = (lengths / torch.tensor([max(1, len(phi)) for phi in logits]).to(lengths)).sum()
        return (gates.lambda_bits or 0.0) * bits + (gates.lambda_ranks or 0.0) * ranks

    def before_step(self, ctx: Step) -> None:
        """What stands still has no gradient at all: a 0 would count as a step for Adam."""
        for layer in self.layers.values():
            for name in IDLE[self._phase()]:
                getattr(layer, name).grad = None
        for closing in self.closings.values():
            closing.hear()

    def after_step(self, ctx: Step) -> Kept:
        self.step = ctx.step
        for closing in self.closings.values():  # of ranks, then of the bits of those that live
            closing.close(ctx.step)
        for layer in self.layers.values():
            if layer.phase == Phase.DENSE and ctx.step >= self.dense:  # or later, if it was skipped
                layer.calibrate()
            if layer.phase == Phase.GATED and ctx.step >= self.gated:
                layer.phase.fill_(Phase.FROZEN)
        opened = self._opened()
        if not torch.equal(opened, self.opened):
            self.opened, self.moved = opened, ctx.step
        return {}

    def settled(self) -> bool:
        """Gates stand, or targets are met and what a strength pushes has come to rest.

        That is, no gate has opened or closed for a tenth of the run since one first did.
        """
        gates = self.config.gates
        met = all(closing.met for closing in self.closings.values())
        at_work = gates.lambda_bits or gates.lambda_ranks
        quiet = self.moved > 0 and self.step - self.moved >= max(1, self.steps // 10)
        return met and (self.step >= self.gated or not at_work or quiet)

    def told(self) -> Mapping[str, Any]:
        """How many tensors have which width, and how many linears which rank."""
        bits = Counter(b for layer in self.layers.values() for b in layer.bits().values())
        ranks = Counter(layer.rank() for layer in self.layers.values())
        return {"bits": _counts(bits), "linears_of_rank": _counts(ranks)}

    def ended(self) -> tuple[str, ...]:
        layers, gates = self.layers.values(), self.config.gates
        bits = {b for layer in layers for b in layer.bits().values()}
        said = []
        if bits == {BITS[0]} and gates.bits is None:
            said.append(closed("bit", "every tensor is at 2 bits, the floor", "lambda_bits"))
        if bits == {BITS[-1]} and gates.lambda_bits:
            said.append(unmoved("bit", "every tensor is at 32 bits", "lambda_bits"))
        if all(layer.rank() <= 1 < layer.r for layer in layers) and gates.keep is None:
            said.append(closed("rank", "no linear has more than rank 1", "lambda_ranks"))
        if all(layer.open_ranks().all() and layer.r > 1 for layer in layers) and gates.lambda_ranks:
            said.append(unmoved("rank", "every linear has its start rank", "lambda_ranks"))
        return tuple(said)

    def _phase(self) -> Phase:
        return Phase(int(next(iter(self.layers.values())).phase))

    def _opened(self) -> Tensor:
        """Which gates are open, over all layers."""
        layers = self.layers.values()
        logits = [part.detach().flatten() for x in layers for part in (x.bit_logits, x.rank_logits)]
        return quantizer.is_open(torch.cat(logits))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"opened": self.opened, "steps": torch.tensor([self.step, self.moved])}
        for target, closing in self.closings.items():
            state |= {f"{target}.{key}": value for key, value in closing.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.opened = state["opened"].to(self.opened.device)
        self.step, self.moved = state["steps"].tolist()
        for target, closing in self.closings.items():
            closing.load_state_dict({key: state[f"{target}.{key}"] for key in ("worth", "met")})


def _counts(found: Counter[int]) -> dict[str, int]:
    return {str(value): found[value] for value in sorted(found)}


VARIANT = Variant(BLoRAConfig, BLoRALinear, BayesianGates, Promises(exchangeable_ranks=False))

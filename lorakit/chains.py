"""Chains of gates that close until a target is met: B-LoRA's, of ranks and of bits.

A gate of a chain is on only if all before it are, so chains close from their ends. What a gate is
worth is what the loss has asked for it so far,

    worth = -sum_t dL_t / dphi,     and at least that of every gate behind it,

which is as far as plain gradient descent would have moved its logit, but for the rate. Adam would
move all equally far, whatever the size of their gradients, unless a penalty came in to measure them
against, whose strength somebody must know.

So the logits are not the optimizer's. They stand at their start; where a gate is in line to close
(`Target`), its logit is led to the threshold evenly, so that it is drawn open less and less often,
and in its turn it is shut, in training as in evaluation, for good.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lorakit.errors import RecipeError
from lorakit.quantizer import DEAD, THRESHOLD
from lorakit.target import Target

FADE = 0.1
"""The share of the run in which a gate that is to close is led there."""


class Tally(NamedTuple):
    """What is counted for a target, and how much of it is wanted."""

    gates: Tensor  # (c, l) float64: what closing a gate takes away
    free: float  # what no gate takes away
    left: float  # the target

    @property
    def whole(self) -> float:
        """With every gate open."""
        return self.free + float(self.gates.sum())


class Closing:
    """Gates of one kind, in c chains of l or fewer, on their way to a target."""

    def __init__(
        self,
        logits: Sequence[nn.Parameter],
        start: float,
        tally: Callable[..., Tally],
        key: str,
        steps: int,
        window: tuple[int, int],
    ) -> None:
        """`logits` are (l,), a chain, or (chains, l) each; `tally` tells what counts now, or with
        `fresh=True` at the start of the run. Gates close within `window`, two steps.

        Raises:
            RecipeError: with the `key` that asks for it: the target cannot be met, or not in time.

        """
        self.logits, self.start, self.tally = logits, start, tally
        self.fade, self.met = max(1.0, FADE * steps), False
        self.worth = torch.zeros_like(self._phi())
        first, (begin, end) = tally(fresh=True), window
        if first.left < first.free:
            raise RecipeError(
                f"{key}: the first rank of every linear has no gate, and these are "
                f"{first.free / first.whole:.3g} of all; ask for so much, or start with more ranks."
            )
        cost = torch.cat([first.gates[first.gates > 0], first.gates.new_tensor([first.free])])
        self.target = Target.of(cost, first.left / first.whole, steps, begin, end)
        self.target.refuse_haste(begin, key, len(cost) - 1)

    def hear(self) -> None:
        """Takes note of the gradients there are, and takes them out of the optimizer's sight.

        Those that are no finite number are nothing to go by: the step is left out, the run goes on.
        """
        asked = stacked([torch.zeros_like(p) if p.grad is None else p.grad for p in self.logits])
        self.worth -= asked.where(asked.isfinite(), 0.0)
        for p in self.logits:
            p.grad = None

    @torch.no_grad()
    def close(self, step: int) -> None:
        """Leads and shuts the gates that are in line at this step."""
        if self.met or step < self.target.first:
            return
        tally, phi = self.tally(), self._phi().flip(1)  # from the ends: of equals the last closes
        live = phi > DEAD
        worth = self.worth.flip(1).where(live, -torch.inf).cummax(1).values[live]
        score = torch.cat([worth, worth.new_full((1,), torch.inf)])
        cost = tally.gates.to(phi.device).flip(1)[live]
        cost = torch.cat([cost, cost.new_tensor([tally.free])])
        due = self.target._replace(left=tally.left).due(score, cost, step)[:-1]
        led = THRESHOLD + (self.start - THRESHOLD) * (due / self.fade).clamp(max=1.0)
        phi[live] = torch.where(due > 0, led, DEAD)
        rows = phi.flip(1).split([len(torch.atleast_2d(p)) for p in self.logits])
        for p, own in zip(self.logits, rows, strict=True):
            p.copy_(own[:, : p.shape[-1]].view_as(p))
        self.met = step >= self.target.last and not (due.isfinite() & (due > 0)).any()

    def _phi(self) -> Tensor:
        """The logits, (c, l); behind a chain's end, shut."""
        return stacked([p.detach() for p in self.logits], fill=DEAD)

    def state_dict(self) -> dict[str, Tensor]:
        """All that changes but the logits."""
        return {"worth": self.worth, "met": torch.tensor(self.met)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`."""
        self.worth, self.met = state["worth"].to(self.worth.device), bool(state["met"])


def stacked(parts: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """Chains of unequal length, each (l,) or (chains, l), as one matrix, filled up behind."""
    longest = max(part.shape[-1] for part in parts)
    return torch.cat(
        [pad(torch.atleast_2d(p), (0, longest - p.shape[-1]), value=fill) for p in parts]
    )

"""What training moves, and how far it is: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isnan
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorakit.adapter import Adapter, Controller


@dataclass
class Progress:
    """How far a run is: what must survive a restart besides tensors."""

    step: int = 0
    best: list[tuple[int, float]] = field(default_factory=list)
    """Steps and scores of the best evaluations since ranks have settled, the best one first."""
    stale: int = 0
    """Evaluations since the best one."""
    loss: float = 0.0
    """Summed over the items since the last logged row."""
    items: int = 0
    skipped: int = 0
    """Steps not taken in this run, for want of a finite loss."""
    skipped_in_a_row: int = 0

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation, if there is one."""
        return self.best[0][0] if self.best else None

    def judge(self, score: float, places: int = 1) -> bool:
        """Takes note of a score, higher being better; whether it is among the `places` best so far.

        Of equal ones the earliest is the best, and no number is worse than any.
        """
        here = (self.step, -inf if isnan(score) else score)
        self.best = sorted([*self.best, here], key=lambda known: -known[1])[:places]
        self.stale = 0 if self.best[0] == here else self.stale + 1
        return here in self.best

    def forget_best(self) -> None:
        """Ranks have moved: what was the best is another model."""
        self.best, self.stale = [], 0

    def mean_loss(self) -> float | None:
        """Since this was last asked; None where no step was taken."""
        mean = self.loss / self.items if self.items else None
        self.loss, self.items = 0.0, 0
        return mean

    def took(self, loss: float, items: int) -> None:
        """Takes note of a step."""
        self.loss, self.items = self.loss + loss * items, self.items + items
        self.skipped_in_a_row = 0

    def skip(self) -> None:
        """Takes note of a step that was not taken."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1


@dataclass(frozen=True)
class Trainee:
    """What training moves, and how far it is: what a checkpoint holds."""

    model: nn.Module
    layers: Mapping[str, Adapter]
    controller: Controller[Any, Any]
    optimizer: Optimizer
    progress: Progress = field(default_factory=Progress)

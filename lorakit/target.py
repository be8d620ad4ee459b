"""A target for the ranks kept: which of them die, and when, so that it is met at any run's length.

Every step decides anew, from the scores of the ranks that live: the least useful are in line to
die, as many as the target wants, one after the other and evenly over the steps left. So it is met
exactly, whatever scores do meanwhile, without a strength that somebody must know.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lorakit.errors import RecipeError


class Target(NamedTuple):
    """What is to be left, and the steps in which ranks die: `first` to `last`."""

    left: float
    """In the unit of the ranks' cost."""
    first: int
    last: int
    """Three quarters into the run: the rest of it trains what lives."""
    at_most: int
    """How many ranks may die in one step: a twentieth of all, but always one."""

    @classmethod
    def of(
        cls, cost: Tensor, keep: float, steps: int, begin: int = 1, end: int | None = None
    ) -> "Target":
        """A share `keep` of ranks that cost `cost`, (r,), in a run of so many steps.

        The first rank dies a quarter into the run, or as soon behind that as `begin` allows, or
        sooner where deaths need more steps; none dies after step `end`. A `first` before `begin`
        says that there are too few steps.
        """
        left, at_most = keep * float(cost.sum()), max(1, len(cost) // 20)
        last = min(max(1, 3 * steps // 4), end or steps)
        most = dying(cost.sort().values, left)  # the cheapest first
        first = min(max(begin, steps // 4 + 1), last + 1 - ceil_div(most, at_most))
        return cls(left, first, last, at_most)

    def refuse_haste(self, begin: int, key: str, count: int) -> None:
        """Raises RecipeError, with the `key` that asks for it, if any of `count` ranks, or gates,
        would have to die before step `begin`.
        """
        if self.first < begin:
            need, there = self.last + 1 - self.first, max(0, self.last + 1 - begin)
            raise RecipeError(
                f"{key}: takes {need:,} steps, since at most {self.at_most} of {count} may close "
                f"in one; from step {begin} to step {self.last} there are {there:,}; train longer."
            )

    def due(self, score: Tensor, cost: Tensor, step: int) -> Tensor:
        """The steps each living rank has still to go, (k,): 0 dies in this, infinity stays.

        `score` and `cost`, (k,), are how useful a rank is and what it costs. The order is that of
        the scores: they say which rank is more useful, not how many times, so a score for the cost
        would only let the dearest die first.
        """
        line = score.argsort(stable=True)
        count, steps = dying(cost[line], self.left), max(1, self.last + 1 - step)
        place = torch.arange(count, device=score.device)
        even = ((place + 1) * steps + count - 1) // max(1, count) - 1
        due = torch.full_like(score, torch.inf)
        due[line[:count]] = torch.maximum(even, place // self.at_most).to(due.dtype)
        return due if step >= self.first else torch.full_like(due, torch.inf)


def dying(cost: Tensor, left: float) -> int:
    """How many ranks, in this order, die until the cost of the others is closest to `left`.

    One stays, whatever is asked for.
    """
    others = cost.sum() - cost.cumsum(0)  # after 1, 2, … deaths
    after = torch.cat([cost.sum()[None], others])[: len(cost)]
    return int((after - left).abs().argmin())


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)

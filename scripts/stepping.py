"""A run that is taken a few steps at a time, so that several can be timed in turn.

The steps are those of `lorakit.train`'s own loop. Imported by the benches beside it.
"""

from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from time import perf_counter
from typing import Any

from lorakit import optim, variants
from lorakit.engine import Engine
from lorakit.prepare import Prepared
from lorakit.timetable import Timetable
from lorakit.train import train
from lorakit.trainee import Trainee


class Pause(Exception):  # noqa: N818  (no error)
    """Leaves the loop after a step; entered again, it goes on with the next."""


class Clock:
    """An observer that notes when steps end, and pauses after so many."""

    def __init__(self, steps: int, now: Callable[[], float]) -> None:
        self.steps, self.now = steps, now
        self.ends: list[float] = []

    def tick(self, step: int) -> None:
        """Notes the time."""
        self.ends.append(self.now())
        if len(self.ends) == self.steps:
            raise Pause

    def log(self, row: dict[str, Any]) -> None:
        """Numbers are not looked at."""

    def save(self, trainee: Trainee) -> None:
        """Nothing is written."""

    def stopping(self) -> bool:
        """The clock alone ends it."""
        return False


class Runner:
    """A recipe with everything loaded, and a run of `steps` steps ahead.

    `now` tells the seconds: those that pass, or those that the process computes.
    """

    def __init__(
        self, prepared: Prepared, steps: int, now: Callable[[], float] = perf_counter
    ) -> None:
        loaded, model, layers = prepared.recipe, prepared.base.model, prepared.layers
        controller = variants.get(loaded.adapter.variant).controller(layers, loaded.adapter, steps)
        optimizer = optim.adamw(model, layers, loaded.train)
        self.task, self.section = prepared.task, loaded.train
        self.timetable = Timetable(steps, loaded.train.log_every, None, None)
        self.trainee = Trainee(model, layers, controller, optimizer)
        self.engine, self.now = Engine(), now

    def take(self, steps: int) -> list[float]:
        """Takes that many steps; the seconds of each but the first."""
        clock, own = Clock(steps, self.now), (self.task, self.section, self.timetable)
        with suppress(Pause):
            train(self.trainee, *own, 0, self.engine, clock)
        return [end - start for start, end in pairwise(clock.ends)]

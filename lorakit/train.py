"""The loop, all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lorakit import optim
from lorakit.adapter import Controller, Kept, Stage, Step
from lorakit.data.batching import Batch, ahead
from lorakit.engine import Engine
from lorakit.errors import NotFiniteError
from lorakit.tasks import COSTS, Task, evaluate
from lorakit.timetable import Timetable, TrainSection
from lorakit.trainee import Progress, Trainee

Row = dict[str, Any]

SAMPLE = 1000
"""Training rows scored at the end of each stage: what the model remembers of what it has seen
(sparsifying scheduler of SoRA, Algorithm 1; the number is that of its authors' code)."""

HOPELESS = 10
"""So many steps without a finite loss, one after the other, and no next one will have it."""


class Observer(Protocol):
    """Who hears of the run. What becomes of it is the observer's affair; the loop does not wait."""

    def tick(self, step: int) -> None:
        """A step is over."""

    def log(self, row: Row) -> None:
        """Numbers of a step: a line of metrics.jsonl."""

    def save(self, trainee: Trainee) -> None:
        """A checkpoint is due."""

    def stopping(self) -> bool:
        """Whether the run was told to stop: the step at hand is its last, and is saved.

        Several processes that must wait for their devices ask when they read what steps came to.
        """


def train(
    trainee: Trainee,
    task: Task,
    section: TrainSection,
    timetable: Timetable,
    seed: int,
    engine: Engine,
    observer: Observer,
) -> None:
    """Takes the steps behind `trainee.progress`, to the last one or until patience ends.

    The loss of a step is the mean over all items of its batches, whatever portions they come in.
    It is read before the step is taken where that is for nothing, as on a CPU, or where the step
    may be skipped; else when something is told of it or saved, and the device is not waited for
    between.

    Raises:
        NotFiniteError: a loss or its gradient is not finite, and `non_finite` does not say to skip
            the step, or it was skipped too often; names the rows of the step, of which nothing
            was saved.

    """
    progress, controller, optimizer = trainee.progress, trainee.controller, trainee.optimizer
    model = engine.prepare(trainee.model, section.compile).train()
    stages = controller.stages()
    weights, rate = optim.parameters(optimizer), optim.rates(optimizer)
    moment, forget = optim.second_moments(optimizer), optim.forgetting(optimizer)
    stream = ahead(portions(task, section, seed, progress.step, engine))
    speed, sample = Speed(), task.sample("train", SAMPLE)  # costs nothing until it is scored
    unread: list[Unread] = []

    def score(task: Task, split: str) -> dict[str, float]:
        return evaluate(model, task, split, section.eval_batch_size, engine.device)

    stop = False
    while not (stop or finished(progress, section, timetable)):
        started = perf_counter()
        step = progress.step = progress.step + 1
        place = place_of(step, stages)
        share = place.stage.rate * optim.factor(place.step, place.stage.steps, section)
        optim.set_rates(optimizer, share)
        ctx = Step(step, timetable.steps, rate, place.number, moment, forget)

        # the gradient: every batch adds its part of the mean over all items of the step
        portion = next(stream)
        part = backward(model, task, portion.mine, portion.items, controller, engine)
        controller.before_step(ctx)
        norm = engine.clip(weights, section.clip)
        unread.append(Unread(step, part, norm, portion.items, rows_of(portion.mine)))

        # the step: the optimizer moves the weights, the variant has the last word
        stage_over = place.last and len(stages) > 1
        told = stage_over or timetable.anything(step)
        read = told or not engine.waits or section.non_finite == "skip"
        if not read or take_note(progress, unread, section, engine):
            optimizer.step()
            if kept := controller.after_step(ctx):
                compact(trainee, kept)
                weights, rate = optim.parameters(optimizer), optim.rates(optimizer)
        optimizer.zero_grad(set_to_none=True)
        if not controller.settled():
            progress.forget_best()
        speed.add(portion.rows, perf_counter() - started)

        # now and then, at the end of a stage, and at the end
        better = False
        if stage_over or timetable.due(step, timetable.log_every):
            observer.log(row_of(trainee, float(norm), section.lr * share, speed.read()))
        if stage_over or timetable.due(step, timetable.eval_every):
            scores = score(task, "validation")
            known = {"stage": place.number, "train": score(sample, "train")} if stage_over else {}
            observer.log({"step": step, **scores, **known})
            if controller.settled():
                better = progress.judge(headline(scores, section.best), section.keep_best or 1)
        over = finished(progress, section, timetable)
        stop = (read or engine.processes == 1) and engine.any(observer.stopping())
        if better or over or stop or stage_over or timetable.due(step, timetable.save_every):
            take_note(progress, unread, section, engine)
            observer.save(trainee)
        observer.tick(step)


class Portion(NamedTuple):
    """What a step is made of."""

    items: int
    """That its loss is the mean over, in all processes."""
    rows: int
    """In all processes."""
    mine: list[Batch]
    """Those of this process, on its device."""


def portions(
    task: Task, section: TrainSection, seed: int, start: int, engine: Engine
) -> Iterator[Portion]:
    """Those of all steps behind `start`, without end."""
    pieces = section.accumulate * engine.processes
    for batches in task.steps(section.batch_size, pieces, seed, start):
        mine = [batch.to(engine.device) for batch in batches[engine.index :: engine.processes]]
        rows = sum(len(batch.rows) for batch in batches)
        yield Portion(sum(map(task.items, batches)), rows, mine)


class Unread(NamedTuple):
    """What a step came to, on the device still."""

    step: int
    part: Tensor
    """This process's part of the loss, ()."""
    norm: Tensor
    """Of the gradient, in all processes, before it is clipped; ()."""
    items: int
    rows: list[int]
    """Of this process."""


def take_note(
    progress: Progress, unread: list[Unread], section: TrainSection, engine: Engine
) -> bool:
    """Reads what steps came to, if any, and forgets them; whether the last may be taken.

    Raises:
        NotFiniteError: one may not, and the recipe does not skip it, or they were too many.

    """
    fine = True
    for each, (loss, norm) in zip(unread, engine.read(unread), strict=True):
        if fine := isfinite(loss) and isfinite(norm):
            progress.took(loss, each.items)
        else:
            progress.skip()
            refuse_to_go_on(progress, section, each, loss, norm)
    unread.clear()
    return fine


def backward(
    model: nn.Module,
    task: Task,
    batches: Sequence[Batch],
    items: int,
    controller: Controller[Any, Any],
    engine: Engine,
) -> Tensor:
    """Adds to the gradients what `batches` give to the mean loss over `items`; returns it, ().

    One graph is alive at a time. The variant's penalty joins the last of them, a share in every
    process; the loss returned is without it. Nothing is read: the device goes on by itself.
    """
    loss = torch.zeros((), device=engine.device)
    for i, batch in enumerate(batches, start=1):
        with engine.accumulating(model, more=i < len(batches)):
            part = task.loss(model, batch) / items
            loss += part.detach()
            penalty = controller.penalty() if i == len(batches) else None
            engine.backward(part if penalty is None else part + penalty / engine.processes)
    return loss


def compact(trainee: Trainee, kept: Kept) -> None:
    """Rebuilds layers at the ranks they keep, with the optimizer's moments."""
    for name, ranks in kept.items():
        optim.compact(trainee.optimizer, trainee.layers[name].compact(ranks), ranks)


class Place(NamedTuple):
    """Where a step lies among the stages of a run."""

    number: int
    """Counts from 0."""
    stage: Stage
    step: int
    """Within the stage, from 1."""

    @property
    def last(self) -> bool:
        """Whether it is the stage's last."""
        return self.step == self.stage.steps


def place_of(step: int, stages: Sequence[Stage]) -> Place:
    """The place of a step, counted from 1."""
    for number, stage in enumerate(stages):
        if step <= stage.steps:
            return Place(number, stage, step)
        step -= stage.steps
    raise ValueError(f"{step} steps behind the last stage")


@dataclass
class Speed:
    """Rows and seconds since it was last read; evaluations are not counted."""

    rows: int = 0
    seconds: float = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """A step."""
        self.rows, self.seconds = self.rows + rows, self.seconds + seconds

    def read(self) -> float:
        """Rows in a second; starts anew."""
        speed = round(self.rows / self.seconds, 1)
        self.rows, self.seconds = 0, 0.0
        return speed


def finished(progress: Progress, section: TrainSection, timetable: Timetable) -> bool:
    """Whether the last step is done, or patience has ended."""
    out_of_patience = section.patience is not None and progress.stale >= section.patience
    return progress.step >= timetable.steps or out_of_patience


def headline(scores: Mapping[str, float], best: str | None) -> float:
    """The score that picks the best checkpoint, turned so that higher is better."""
    name = best or next(iter(scores))
    return -scores[name] if name in COSTS else scores[name]


def row_of(trainee: Trainee, norm: float, lr: float, speed: float) -> Row:
    """What is told of a step, as JSON has it, and of the loss since the last row."""
    progress, ranks = trainee.progress, {n: layer.rank() for n, layer in trainee.layers.items()}
    return {
        "step": progress.step,
        "loss": progress.mean_loss(),
        "norm": norm if isfinite(norm) else None,
        **({"skipped": progress.skipped} if progress.skipped else {}),
        "lr": lr,
        "samples_per_s": speed,
        **trainee.controller.told(),
        "ranks": ranks,
    }


def rows_of(batches: Sequence[Batch]) -> list[int]:
    """The numbers of their rows in the training split."""
    return [row for batch in batches for row in batch.rows]


def refuse_to_go_on(
    progress: Progress, section: TrainSection, failed: Unread, loss: float, norm: float
) -> None:
    """Raises NotFiniteError unless the recipe skips such steps, and they are not all such."""
    if section.non_finite == "skip" and progress.skipped_in_a_row < HOPELESS:
        return
    often = f", as in the {HOPELESS - 1} steps before" if section.non_finite == "skip" else ""
    raise NotFiniteError(
        f"step {failed.step}: the loss is {loss:g} and its gradient's norm {norm:g}{often}; "
        f"stopped, and nothing of that step is saved.\n  Rows of the step, counted from 0 in the "
        f"training split: {', '.join(map(str, failed.rows))}\n  A lower train.lr or "
        "model.precision=fp32 may help; train.non_finite=skip leaves single such steps out."
    )

"""What is told of a run while it goes on: written to its folder, and shown."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch

from lorakit import models, run_folder
from lorakit.checkpoint import Meta
from lorakit.disk import sync
from lorakit.errors import FolderError
from lorakit.prepare import Prepared
from lorakit.timetable import Timetable
from lorakit.train import Row
from lorakit.trainee import Trainee

RUN_AWAY = 1.5
"""A loss so many times the first one's is no noise of batches: training has made things worse."""


class Screen(Protocol):
    """Where a person watches."""

    def note(self, text: str) -> None:
        """A thing to be said aloud, once."""

    def warn(self, text: str) -> None:
        """A thing not to be missed."""

    def begin(self, done: int, timetable: Timetable, start_ranks: int) -> None:
        """Training starts, `done` steps in; so many ranks there are to learn from."""

    def tick(self, step: int) -> None:
        """A step is over."""

    def log(self, row: Row) -> None:
        """A row of metrics.jsonl."""


class Journal:
    """Writes what the loop tells: metrics.jsonl and checkpoints; and shows it."""

    def __init__(
        self,
        folder: Path,
        prepared: Prepared,
        screen: Screen,
        writes: bool,
        signals: Sequence[int],
    ) -> None:
        self.folder, self.prepared, self.screen, self.writes = folder, prepared, screen, writes
        self.signals = signals
        self.first_loss: float | None = None
        self.scored: Row = {}

    def tick(self, step: int) -> None:
        """Passes it on."""
        if self.writes:
            self.screen.tick(step)

    def log(self, row: Row) -> None:
        """Appends a line."""
        if not self.writes:
            return
        with self._rows() as path, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.screen.log(row)
        self._watch(row)
        if "ranks" not in row:  # of a step, where "loss" is that of its training rows
            self.scored = row

    def save(self, trainee: Trainee) -> None:
        """Writes a checkpoint, with the scores if this step has been evaluated."""
        if not self.writes:
            return
        step, prepared = trainee.progress.step, self.prepared
        head = prepared.task.head()
        names = prepared.task.metric_names()
        scored = self.scored if self.scored.get("step") == step else {}
        meta = Meta(
            step=step,
            progress=asdict(trainee.progress),
            labels=head.labels,
            head=prepared.base.head,
            whole=prepared.whole,
            plans={name: (planned.rank, planned.scale) for name, planned in prepared.plans.items()},
            scores={name: scored[name] for name in names if name in scored},
            precision=_precision(prepared.base),
            kind=head.kind,
            multiple=head.multiple,
            base=prepared.base.fingerprint,
            origins=dict(prepared.task.origins),
        )
        with self._rows() as path:
            sync(path)  # all that comes before the checkpoint
        run_folder.save(self.folder, trainee, prepared.whole_modules(), meta)
        self._thin_out(trainee)

    def _thin_out(self, trainee: Trainee) -> None:
        """Removes the checkpoints that the recipe does not ask to be kept."""
        count, timetable = self.prepared.recipe.train.keep_last, self.prepared.timetable
        if count is None:
            return
        ends = accumulate(stage.steps for stage in trainee.controller.stages())
        best = (step for step, _ in trainee.progress.best)
        due = partial(timetable.due, every=timetable.save_every)
        run_folder.thin_out(self.folder, count, due, {*ends, *best})

    @contextmanager
    def _rows(self) -> Iterator[Path]:
        """metrics.jsonl; within it, what the disk answers becomes a message."""
        path = self.folder / "metrics.jsonl"
        try:
            yield path
        except OSError as error:
            raise FolderError(f"{path} cannot be written: {error.strerror}.") from error

    def _watch(self, row: Row) -> None:
        """Warns, once, of a loss far above the first that was told."""
        loss = row.get("loss") if "ranks" in row else None
        if loss is None:
            return
        if self.first_loss is None:
            self.first_loss = loss
        elif loss > RUN_AWAY * self.first_loss:
            risen = f"the loss has risen to {loss:.3g}, from {self.first_loss:.3g}"
            self.screen.warn(f"step {row['step']:,}: {risen}; a lower train.lr may help")
            self.first_loss = float("inf")

    def stopping(self) -> bool:
        """Whether a signal has come."""
        return bool(self.signals)


def _precision(base: models.Base) -> str:
    dtypes = {p.dtype for p in base.model.parameters() if not p.requires_grad}
    return "bf16" if torch.bfloat16 in dtypes else "fp32"

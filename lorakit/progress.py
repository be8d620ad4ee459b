"""Progress on a terminal, and lines elsewhere: what a person sees of long work; no torch.

All of it goes to standard error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorakit.display import scores
from lorakit.errors import Doubt
from lorakit.pace import LOG, Pace

COMMON = {"step", "loss", "norm", "lr", "samples_per_s", "ranks"}
"""What every logged row has; what else is there, the variant tells."""


EVERY = 10.0
"""Seconds between two lines that tell how far long work has come."""


class _Heard(logging.Handler):
    """Passes on how far work has come."""

    def __init__(self, show: Callable[[Pace], None]) -> None:
        super().__init__(logging.INFO)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        if pace := getattr(record, "pace", None):
            self.show(pace)


class Watch:
    """Shows long work: bars on a terminal, a line now and then elsewhere.

    Used as a context, it hears of what work tells `lorakit.pace` as well.
    """

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet or os.environ.get("RANK", "0") != "0"  # of many processes one speaks
        self.bars: Progress | None = None
        self.training: TaskID | None = None
        self.others: dict[str, TaskID] = {}
        self.steps, self.first, self.start_ranks = 0, 0, 0
        self.started = self.said = perf_counter()
        self.waited_for: str | None = None
        self.heard = _Heard(self.pace)

    def __enter__(self) -> Watch:
        LOG.addHandler(self.heard)
        LOG.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        LOG.removeHandler(self.heard)
        self._close()

    def note(self, text: str) -> None:
        """A line of its own; a doubt is a warning."""
        if isinstance(text, Doubt):
            self.warn(text)
        elif not self.quiet:
            self.console.print(f"· {text}", highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """What must not be missed, said even where all else is silent."""
        self.console.print(f"WARNING: {text}", style="bold yellow", highlight=False, markup=False)

    def begin(self, done: int, timetable: Any, start_ranks: int) -> None:
        """Starts the bar, `done` steps in."""
        self.steps, self.first, self.start_ranks = timetable.steps, done, start_ranks
        self.started = perf_counter()
        if self._draws():
            self.training = self._open().add_task(
                "training", total=self.steps, completed=done, numbers=""
            )

    def tick(self, step: int) -> None:
        """Moves the bar of training."""
        if self.bars is not None and self.training is not None:
            self.bars.update(self.training, completed=step)

    def pace(self, pace: Pace) -> None:
        """Moves a bar that is there until the work is done; a line now and then elsewhere."""
        over = pace.done >= pace.total
        if self._draws():
            bars = self._open()
            if pace.what not in self.others:
                self.others[pace.what] = bars.add_task(pace.what, total=pace.total, numbers="")
            bars.update(self.others[pace.what], completed=pace.done)
            if over:
                bars.remove_task(self.others.pop(pace.what))
            if not bars.tasks:
                self._close()
        elif over or pace.what != self.waited_for:
            self.waited_for, self.said = None if over else pace.what, perf_counter()
        elif perf_counter() - self.said >= EVERY:
            self.said = perf_counter()
            self.note(str(pace))

    def _draws(self) -> bool:
        return self.console.is_terminal and not self.quiet

    def _open(self) -> Progress:
        """The bars, which are drawn from now on."""
        if self.bars is None:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
            )
            self.bars.start()
        return self.bars

    def _close(self) -> None:
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.training = None, None
        self.others.clear()

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: losses move into the bar, scores get a line."""
        if self.quiet:
            return
        if "ranks" not in row:
            named = {k: v for k, v in row.items() if isinstance(v, float)}
            line = f"step {row['step']:>5}  {scores(named)}"
            self.console.print(line, highlight=False, soft_wrap=True)
        elif self.bars is not None and self.training is not None:
            self.bars.update(self.training, numbers=self._numbers(row))
        else:
            left = _duration(self._seconds_left(row["step"]))
            line = f"step {row['step']:>5}/{self.steps}  {self._numbers(row)}  {left} left"
            self.console.print(line, highlight=False, soft_wrap=True)

    def _numbers(self, row: Mapping[str, Any]) -> str:
        live = sum(row["ranks"].values())
        loss = "none" if row["loss"] is None else f"{row['loss']:.4f}"
        return (
            f"loss {loss}  lr {row['lr']:.1e}  {_rate(row['samples_per_s'])} rows/s  "
            f"ranks {live}/{self.start_ranks}"
        ) + "".join(f"  {name} {_told(row[name])}" for name in row if name not in COMMON)

    def _seconds_left(self, step: int) -> float:
        done = max(1, step - self.first)
        return (perf_counter() - self.started) / done * (self.steps - step)


@contextmanager
def counting(console: Console, what: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """Shows on a terminal how many of `what` are done: a function to call for each."""
    if quiet or not console.is_terminal:
        yield lambda: None
        return
    columns = (SpinnerColumn(), TextColumn(f"{{task.completed:,.0f}} {what}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda: bar.update(task, advance=1)


def _told(value: Any) -> str:
    """A variant's own number, or a small table: `2:14 8:3`."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{_told(inner)}" for key, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _rate(each_second: float) -> str:
    return f"{each_second:.0f}" if each_second >= 10 else f"{each_second:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

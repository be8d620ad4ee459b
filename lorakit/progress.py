"""Progress on a terminal, and lines elsewhere: what a person sees of long work; no torch.

All of it goes to standard error.
"""

from __future__ import annotations

import logging
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
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lorakit.display import scores

COMMON = {"step", "loss", "norm", "lr", "samples_per_s", "ranks"}
"""What every logged row has; what else is there, the variant tells."""


LOG = logging.getLogger("lorakit")
"""Where long work far from a screen tells how far it has come."""


class _Heard(logging.Handler):
    """Passes the lines of a log on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


class Watch:
    """Shows a run: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console, self.quiet = console, quiet
        self.bar: Progress | None = None
        self.steps, self.first, self.start_ranks = 0, 0, 0
        self.started = perf_counter()
        self.heard = _Heard(self.note)

    def __enter__(self) -> Watch:
        LOG.addHandler(self.heard)
        LOG.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        LOG.removeHandler(self.heard)
        if self.bar is not None:
            self.bar.stop()

    def note(self, text: str) -> None:
        """A line of its own."""
        if not self.quiet:
            self.console.print(f"· {text}", highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """What must not be missed, said even where all else is silent."""
        self.console.print(f"WARNING: {text}", style="bold yellow", highlight=False, markup=False)

    def begin(self, done: int, timetable: Any, start_ranks: int) -> None:
        """Starts the bar, `done` steps in."""
        self.steps, self.first, self.start_ranks = timetable.steps, done, start_ranks
        self.started = perf_counter()
        if self.console.is_terminal and not self.quiet:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                TextColumn("left"),
                console=self.console,
            )
            self.bar.start()
            self.bar.add_task("training", total=self.steps, completed=done, numbers="")

    def tick(self, step: int) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step)

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: losses move into the bar, scores get a line."""
        if self.quiet:
            return
        if "ranks" not in row:
            named = {k: v for k, v in row.items() if isinstance(v, float)}
            line = f"step {row['step']:>5}  {scores(named)}"
            self.console.print(line, highlight=False, soft_wrap=True)
        elif self.bar is not None:
            self.bar.update(self.bar.task_ids[0], numbers=self._numbers(row))
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

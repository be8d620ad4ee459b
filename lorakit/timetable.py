"""How long a run is, in what portions, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorakit.optim import OptimSection

Interval = PositiveInt | Annotated[str, Field(pattern=r"^[1-9]\d* epochs?$")] | None


class TrainSection(OptimSection):
    """How long, in what portions, and what is kept."""

    epochs: PositiveFloat | None = 3
    """Passes over the training rows."""
    steps: PositiveInt | None = Field(None, validate_default=True)
    """Optimizer steps, instead of `epochs`."""
    batch_size: PositiveInt = 32
    """Rows in one forward pass of one process."""
    accumulate: PositiveInt = 1
    """Forward passes in one optimizer step."""
    eval_batch_size: PositiveInt = 64
    """Rows in one forward pass when scoring."""
    activation_checkpointing: bool = False
    """Keep only what enters each block for the backward pass, and compute the rest of it again:
    less memory for about a third more time, the same gradients."""
    compile: bool = False
    """Have torch compile the model in the first steps. For GPUs; on two CPU cores it took two
    minutes, and steps were slower by a fifth."""
    clip: PositiveFloat | None = 1.0
    """Joint gradient norm to clip to; null: none."""
    log_every: PositiveInt = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: Interval = 100
    """Steps between evaluations, or `1 epoch`, `2 epochs`; null: at the end only."""
    save_every: Interval = 100
    """Steps between checkpoints, or epochs as above; null: at the end, and the best."""
    keep_last: PositiveInt | None = None
    """How many of the newest checkpoints are kept, besides the best and those at the ends of
    stages; null: all."""
    keep_best: PositiveInt | None = Field(None, validate_default=True)
    """With `keep_last`, how many of the best by `best` are kept besides, each saved when it is
    scored; of equal ones the earlier; null: the best one."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What follows a loss or gradient that is no finite number: the run stops, and nothing of that
    step is saved, or leaves the step out, at most ten in a row."""
    best: str | None = None
    """Metric that picks the best checkpoint, once ranks have settled; null: the task's first."""
    patience: PositiveInt | None = None
    """Stop after so many evaluations without a better one; null: never."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_epochs(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("steps") is not None and "epochs" not in given:
            return {**given, "epochs": None}
        return given

    @field_validator("steps")
    @classmethod
    def _one_length(cls, steps: int | None, others: ValidationInfo) -> int | None:
        if "epochs" in others.data and (others.data["epochs"] is None) == (steps is None):
            raise ValueError(
                "give `epochs` or `steps`, one of them; "
                "train.steps=N takes '~train.epochs' beside it where the recipe names epochs"
            )
        return steps

    @field_validator("keep_best")
    @classmethod
    def _some_leave(cls, count: int | None, others: ValidationInfo) -> int | None:
        if count is None:
            return count
        if others.data.get("keep_last", 1) is None:
            raise ValueError("without train.keep_last all checkpoints are kept; give both")
        if others.data.get("eval_every", 1) is None:
            raise ValueError("train.eval_every: null scores the last step alone; nothing to rank")
        return count

    def timetable(self, steps_an_epoch: int) -> Timetable:
        """The run's length and intervals in steps."""
        steps = self.steps or max(1, round((self.epochs or 0) * steps_an_epoch))
        return Timetable(
            steps,
            self.log_every,
            _interval(self.eval_every, steps_an_epoch),
            _interval(self.save_every, steps_an_epoch),
        )


class Timetable(NamedTuple):
    """When things happen, in optimizer steps; None: only at the end."""

    steps: int
    log_every: int
    eval_every: int | None
    save_every: int | None

    def due(self, step: int, every: int | None) -> bool:
        """Whether something done `every` so many steps, and at the last one, falls on `step`."""
        return step == self.steps or (every is not None and step % every == 0)

    def anything(self, step: int) -> bool:
        """Whether anything falls on `step`."""
        return any(self.due(step, n) for n in (self.log_every, self.eval_every, self.save_every))


def _interval(every: int | str | None, steps_an_epoch: int) -> int | None:
    """`100` or `2 epochs`, in steps."""
    if isinstance(every, str):
        return int(every.split()[0]) * steps_an_epoch
    return every

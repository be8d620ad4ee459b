"""Scores a run, a checkpoint or a PEFT folder on a task."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit import tasks
from lorakit.engine import Engine
from lorakit.errors import DataError, LorakitError
from lorakit.tasks import Task, TaskSection
from lorakit.trained import Trained


@dataclass(frozen=True)
class Wanted:
    """What to score on; what is null is taken from the run."""

    task: str | None = None
    data_dir: str | None = None
    split: str = "validation"
    limit: int | None = None
    batch_size: int = 64
    few_shot: int | None = None
    """Of the harness's tasks alone, as the next: examples before each question."""
    include: Path | None = None
    """A folder with tasks for the harness."""


@dataclass(frozen=True)
class Scored:
    """A score and all that it is the score of."""

    path: Path
    task: str
    split: str
    rows: int
    precision: str
    scores: dict[str, float]
    notes: tuple[str, ...]


def score(trained: Trained, wanted: Wanted, precision: str) -> Scored:
    """Scores `trained`.

    Raises:
        DataError: rows are missing, or the task's labels are not the head's.
        LorakitError: no task is named and none is known.

    """
    name, task = _ready(trained, wanted)
    engine = Engine()
    model = engine.prepare(trained.model)
    scores = tasks.evaluate(model, task, wanted.split, wanted.batch_size, engine.device)
    rows = task.rows(wanted.split)
    return Scored(trained.path, name, wanted.split, rows, precision, scores, task.notes)


def outputs(trained: Trained, wanted: Wanted) -> tuple[Tensor, tuple[str, ...]]:
    """What `trained` says of each row, (rows, outputs), and what was done to the rows.

    Raises:
        DataError, LorakitError: as `score`, but rows need no labels.

    """
    _, task = _ready(trained, wanted)
    engine = Engine()
    model = engine.prepare(trained.model)
    found = tasks.outputs(model, task, wanted.split, wanted.batch_size, engine.device)
    return found, task.notes


def task_name(trained: Trained, wanted: Wanted) -> str:
    """The wanted task, else the run's own.

    Raises:
        LorakitError: neither is known.

    """
    name = wanted.task or (trained.recipe.task.name if trained.recipe else None)
    if name is None:
        raise LorakitError(f"{trained.path} does not say what it was trained on; give --task.")
    return name


def _ready(trained: Trained, wanted: Wanted) -> tuple[str, Task]:
    """The task's name, and the task with the rows that are wanted."""
    name, task = task_for(trained, wanted)
    check_fit(trained, task, name)
    return name, task.ready(trained.tokenizer).limited(wanted.split, wanted.limit)


def task_for(trained: Trained, wanted: Wanted) -> tuple[str, Task]:
    """The wanted task and its name, with the run's own settings where it is the run's own task."""
    recipe, name = trained.recipe, task_name(trained, wanted)
    if recipe is not None and name == recipe.task.name:
        section, data = recipe.task, recipe.data
    elif name in tasks.OWN:
        raise LorakitError(f"--task {name}: {trained.path} carries no `data` section for it.")
    else:
        length = recipe.task.max_length if recipe else TaskSection(name=name).max_length
        section, data = TaskSection(name=name, max_length=length), None
    if wanted.data_dir is not None and name in tasks.OWN:
        raise LorakitError(f"--data-dir is for GLUE tasks; {name} has its rows in the recipe.")
    if wanted.data_dir is not None:
        section = section.model_copy(update={"data_dir": wanted.data_dir})
    return name, tasks.build(section, data)


def check_fit(trained: Trained, task: Task, name: str) -> None:
    """Raises DataError where the head was trained for other labels than the task's."""
    ours, theirs = trained.head.labels, task.head().labels
    unnamed = all(label == f"LABEL_{i}" for i, label in enumerate(ours))
    same = ours == theirs and trained.head.multiple == task.head().multiple
    if len(ours) != len(theirs) or not (unnamed or same):
        noun = "label" if len(ours) == 1 else "labels"
        raise DataError(
            f"{trained.path} was trained for {len(ours)} {noun} ({', '.join(ours)}); "
            f"{name} has {len(theirs)} ({', '.join(theirs)}): its head cannot be scored on that."
        )

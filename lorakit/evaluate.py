"""Scores a run, a checkpoint or a PEFT folder on a task."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lorakit import tasks
from lorakit.engine import Engine
from lorakit.errors import DataError, LorakitError, several
from lorakit.tasks import Task, TaskSection
from lorakit.tasks.own import OWN
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


def each(wanted: Wanted) -> list[Wanted]:
    """One for every task and every split, where commas stand between several."""
    named = [None] if wanted.task is None else names_in(wanted.task)
    splits = names_in(wanted.split)
    return [replace(wanted, task=task, split=split) for task in named for split in splits]


def names_in(given: str) -> list[str]:
    """Names with commas between them, each once; one at least, which may be empty."""
    found = dict.fromkeys(name for part in given.split(",") if (name := part.strip()))
    return list(found) or [given]


def score(trained: Trained, wanted: Sequence[Wanted], precision: str) -> list[Scored]:
    """Scores `trained` on each task and split.

    Raises:
        DataError, LorakitError: before anything is computed, of all that are wanted: no task is
            named and none is known; rows or their labels are missing, or the task's labels are not
            the head's.

    """
    ready = _each_ready(trained, wanted, scored=True)
    engine = Engine()
    model = engine.prepare(trained.model)
    found = []
    for one, (name, task) in zip(wanted, ready, strict=True):
        scores = tasks.evaluate(model, task, one.split, one.batch_size, engine.device)
        rows, notes = task.rows(one.split), task.notes
        if len(ready) > 1:
            notes = tuple(type(note)(f"{name}: {note}") for note in notes)
        found.append(Scored(trained.path, name, one.split, rows, precision, scores, notes))
    return found


def outputs(trained: Trained, wanted: Sequence[Wanted]) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Of each task and split, what `trained` says of its rows, (rows, outputs), and what was done
    to them.

    Raises:
        DataError, LorakitError: as `score`, but rows need no labels.

    """
    ready = _each_ready(trained, wanted, scored=False)
    engine = Engine()
    model = engine.prepare(trained.model)
    for one, (_, task) in zip(wanted, ready, strict=True):
        found = tasks.outputs(model, task, one.split, one.batch_size, engine.device)
        yield found, task.notes


def _each_ready(trained: Trained, wanted: Sequence[Wanted], scored: bool) -> list[tuple[str, Task]]:
    """The tasks, by name, with the rows that are wanted; all faults at once."""
    found, faults = [], []
    for one in wanted:
        try:
            found.append(_ready(trained, one))
            if scored:
                tasks.refuse_unlabelled(found[-1][1], one.split)
        except LorakitError as error:
            if len(wanted) == 1:
                raise
            faults.append(f"{' '.join(filter(None, (one.task, one.split)))}: {error}")
    if faults:
        raise DataError(several("nothing was scored", faults))
    return found


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
    elif name in OWN:
        raise LorakitError(f"--task {name}: {trained.path} carries no `data` section for it.")
    else:
        section, data = _of_glue(recipe.task, name) if recipe else TaskSection(name=name), None
    if wanted.data_dir is not None and name in OWN:
        raise LorakitError(f"--data-dir is for GLUE tasks; {name} has its rows in the recipe.")
    if wanted.data_dir is not None:
        section = section.model_copy(update={"data_dir": wanted.data_dir})
    return name, tasks.build(section, data)


def _of_glue(trained_on: TaskSection, name: str) -> TaskSection:
    """Another task of GLUE's as the one that was trained on: as long texts, of the same folder."""
    return TaskSection(name=name, max_length=trained_on.max_length, data_dir=trained_on.data_dir)


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

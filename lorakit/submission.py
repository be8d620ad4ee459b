"""GLUE's submission files: what a model predicts of every test row, as gluebenchmark.com reads it.

A table of `index` and `prediction`, rows numbered from 0. A prediction is the label's number, or
its name in the tasks on entailment (but for WNLI), or a similarity from 0 to 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorakit.disk import write_text
from lorakit.errors import DataError, FolderError
from lorakit.tasks import glue

NAMED = ("glue/mnli", "glue/qnli", "glue/rte", "glue/ax")
"""Tasks whose predictions are names."""
FILES = {
    "glue/ax": "AX",
    "glue/mnli": "MNLI-m",
    ("glue/mnli", "test_mismatched"): "MNLI-mm",
    ("glue/mnli", "validation_mismatched"): "MNLI-mm",
}
"""What a file is called, by task, or by task and split; others as the task's folder is."""
SIMILAR = 5.0
"""The most that two texts can be."""


@dataclass(frozen=True)
class Submitted:
    """A file of predictions."""

    path: Path
    """Of the model."""
    task: str
    split: str
    rows: int
    file: Path
    notes: tuple[str, ...]


def check(task: str, folder: Path) -> None:
    """Refuses what GLUE has no file for.

    Raises:
        DataError: the task is none of GLUE's.
        FolderError: `folder` is a file.

    """
    if task not in glue.TASKS:
        raise DataError(
            f"--predictions writes GLUE's submission files, and {task} is none of its tasks; "
            "`lorakit predict --file` answers rows of your own."
        )
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"--predictions: {folder} is no folder.")


def write(folder: Path, task: str, split: str, outputs: Tensor) -> Path:
    """Writes the file of a task from its (rows, outputs), and makes `folder` where it is missing.

    Raises:
        FolderError: it cannot be written.

    """
    name = FILES.get((task, split)) or FILES.get(task) or glue.TASKS[task].folder
    lines = ["index\tprediction"]
    lines += [f"{i}\t{said}" for i, said in enumerate(predictions(task, outputs))]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tsv"
    write_text(path, "\n".join(lines) + "\n")
    return path


def predictions(task: str, outputs: Tensor) -> Sequence[str]:
    """What is said of every row, as the task's file says it."""
    objective = glue.TASKS[task].objective
    guesses = objective.guesses(outputs).tolist()
    if not objective.labels:
        return [f"{min(max(guess, 0.0), SIMILAR):.3f}" for guess in guesses]
    if task in NAMED:
        return [objective.labels[guess] for guess in guesses]
    return [str(guess) for guess in guesses]

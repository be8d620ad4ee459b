"""What is learnt and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor, nn

from lorakit.data import DataSection, read
from lorakit.data.batching import Batch
from lorakit.errors import no_such
from lorakit.models import Head
from lorakit.schema import Section
from lorakit.tasks import glue
from lorakit.tasks.classification import Classification
from lorakit.tasks.texts import TextTask


def names() -> list[str]:
    """Every task a recipe may name."""
    return [*glue.NAMES, *OWN]


class TaskSection(Section):
    """What is learnt and scored."""

    name: str
    """`classification` with a `data` section; or a task of GLUE, which brings its own rows:
    `glue/cola`, `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte` or `wnli`."""
    data_dir: str | None = None
    """A folder in GLUE's official layout (`SST-2/train.tsv`); null: the hub."""
    max_length: PositiveInt = 128
    """Longer texts are cut to so many tokens; of a pair, the longer one first."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in names():
            raise ValueError(no_such("task", name, names()))
        return name


class Task(Protocol):
    """All that the loop and the evaluation know of a problem."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the rows, to be said aloud."""

    def head(self) -> Head:
        """What the model's last layer must be; known before the model is loaded."""

    def ready(self, tokenizer: Any) -> Task:
        """The task with its rows encoded, when they are first asked for."""

    def limited(self, split: str, limit: int | None) -> Task:
        """The task with only the first `limit` rows of a split; None: all."""

    def sample(self, split: str, count: int) -> Task:
        """The task with `count` rows of a split, the same at every call."""

    def rows(self, split: str) -> int:
        """How many rows a split has."""

    def steps(
        self, batch_size: int, pieces: int, seed: int, start: int = 0
    ) -> Iterator[list[Batch]]:
        """Training data without end: for each step from `start`, its batches."""

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        """One pass over a split, for scoring: longest rows first, so that memory runs out early."""

    def items(self, batch: Batch) -> int:
        """How many items the loss of this batch sums over."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss summed over the items of a batch, not their mean."""

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the model says of each row of a batch: (rows, outputs), float32."""

    def metric_names(self) -> tuple[str, ...]:
        """What `score` names, in its order."""

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """The task's metrics, the headline one first."""


def build(section: TaskSection, data: DataSection | None) -> Task:
    """Reads the task's rows; nothing is encoded yet.

    Raises:
        DataError: rows or files are missing or not what the task needs.

    """
    if section.name in OWN:
        assert data is not None  # the recipe has refused it
        return OWN[section.name](section, data)
    splits = glue.read(section.name, section.data_dir)
    return TextTask(splits, section.max_length, glue.TASKS[section.name].objective)


def _classification(section: TaskSection, data: DataSection) -> Task:
    splits = read(data)
    return TextTask(splits, section.max_length, Classification(splits.labels))


OWN: Mapping[str, Callable[[TaskSection, DataSection], Task]] = {
    "classification": _classification,
}
"""Tasks whose rows come from the `data` section, by name."""


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, split: str, batch_size: int, device: torch.device
) -> dict[str, float]:
    """The task's metrics on a split, dropout off; leaves the model in the mode it was in.

    Every process scores all rows: no gathering, and the same decision everywhere.
    """
    training = model.training
    model.eval()
    outputs, labels = [], []
    for batch in task.batches(split, batch_size):
        moved = batch.to(device)
        outputs.append(task.predict(model, moved).cpu())
        labels.append(batch.labels)
    model.train(training)
    return task.score(torch.cat(outputs), torch.cat(labels))

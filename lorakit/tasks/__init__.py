"""What is learnt and how it is scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from pydantic import PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from lorakit.data import DataSection
from lorakit.data.batching import Batch
from lorakit.data.formats import fields
from lorakit.errors import DataError, no_such
from lorakit.models.heads import Head
from lorakit.pace import paced
from lorakit.schema import Section
from lorakit.tasks import glue
from lorakit.tasks.causal import LossOn
from lorakit.tasks.own import OWN, Settled, ignored
from lorakit.tasks.texts import TextTask


def names() -> list[str]:
    """Every task a recipe may name."""
    return [*glue.TASKS, *OWN]


class TaskSection(Section):
    """What is learnt and scored."""

    name: str
    """With a `data` section: `classification`, one label a text; `multi-label`, any number of them;
    `regression`, a number; `token-classification`, a label for each word; `causal-lm` and
    `seq2seq`, an answer in words. Or a task of GLUE, which brings its own rows: `glue/cola`,
    `sst2`, `mrpc`, `qqp`, `stsb`, `mnli`, `qnli`, `rte` or `wnli`; and `glue/ax`, MNLI's
    diagnostics, to score only."""
    data_dir: str | None = None
    """A folder in GLUE's official layout (`SST-2/train.tsv`); null: the hub."""
    max_length: PositiveInt = 128
    """Longer texts are cut to so many tokens; of a pair, the longer one first."""
    format: Literal["auto", "text", "prompt", "alpaca", "chat"] = "auto"
    """What rows of `causal-lm` and `seq2seq` are: texts; prompts with completions; Alpaca's
    `instruction`, `input` and `output`; chats, `messages` or ShareGPT's `conversations`, in the
    words of the model's chat template; or auto: found from the columns, and said. Prompts, texts or
    chats may be in any column that `data.text` names, completions in that of `data.label`."""
    template: str | None = None
    """The prompt that columns are put into, like `Q: {question} A:`; null: the prompt's column."""
    loss_on: LossOn = "completion"
    """What `causal-lm` learns to say: completions (of texts: all), or all, prompts too."""
    packing: bool = False
    """Train `causal-lm` on rows of `max_length` tokens that hold several examples each, none of
    which sees another; the loss is the same, and less is spent on padding."""
    generate: PositiveInt | None = None
    """Have the model write up to so many tokens after each scored prompt, greedily, and score them:
    exact match and ROUGE-L; null: loss and perplexity alone, which is many times faster."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in names():
            raise ValueError(no_such("task", name, names()))
        return name

    @field_validator("data_dir", "format", "template", "loss_on", "packing", "generate")
    @classmethod
    def _heard(cls, value: Any, others: ValidationInfo) -> Any:
        """Refuses what the task would ignore."""
        name, field = others.data.get("name"), str(others.field_name)
        given = name is not None and value != cls.model_fields[field].default
        if given and (why := ignored(str(name), f"task.{field}")):
            raise ValueError(why)
        return value

    @field_validator("template")
    @classmethod
    def _of_columns(cls, template: str | None, others: ValidationInfo) -> str | None:
        if template is None:
            return None
        if others.data.get("format", "auto") not in ("auto", "prompt"):
            raise ValueError("a format of its own; a template makes prompts (task.format: prompt)")
        fields(template)
        return template


COSTS = frozenset({"loss", "perplexity", "rmse"})
"""Metrics that are better the lower they are."""


class Task(Protocol):
    """All that the loop and the evaluation know of a problem."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the rows, to be said aloud."""

    @property
    def origins(self) -> Mapping[str, str | None]:
        """What tells the rows from others of the same name, as `data.Splits` has it."""

    def head(self) -> Head:
        """What the model's last layer must be; known before the model is loaded."""

    def check(self, model: nn.Module) -> None:
        """Raises ModelError where the model, fresh from disk, cannot be taught this."""

    def ready(self, tokenizer: Any) -> Task:
        """The task with its rows encoded, when they are first asked for."""

    def limited(self, split: str, limit: int | None) -> Task:
        """The task with only the first `limit` rows of a split; None: all."""

    def sample(self, split: str, count: int) -> Task:
        """The task with `count` rows of a split, the same at every call."""

    def rows(self, split: str) -> int:
        """How many rows a split has; of a ready task, how many are left once encoded."""

    def rows_per_epoch(self) -> int:
        """How many rows `steps` goes through once: packed ones, where rows are packed."""

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
        return OWN[section.name].build(section, data)
    splits = glue.read(section.name, section.data_dir)
    return TextTask(splits, section.max_length, glue.TASKS[section.name].objective)


def settled(section: TaskSection, data: DataSection | None) -> Settled:
    """The sections with what they leave to be found from the rows.

    So a run's recipe says what a text is prompted with, and which columns it is in, when its rows
    are not at hand.

    Raises:
        DataError: the training rows are missing, or no format or column fits them.

    """
    return Settled(section, data) if data is None else OWN[section.name].settle(section, data)


def evaluate(
    model: nn.Module, task: Task, split: str, batch_size: int, device: torch.device
) -> dict[str, float]:
    """The task's metrics on a split, dropout off; leaves the model in the mode it was in.

    Every process scores all rows: no gathering, and the same decision everywhere.

    Raises:
        DataError: the rows have no labels.

    """
    refuse_unlabelled(task, split)
    found, labels = [], []
    for batch, answer in _answers(model, task, split, batch_size, device):
        found.append(answer)
        labels.append(batch.labels)
    return task.score(torch.cat(found), torch.cat(labels))


def refuse_unlabelled(task: Task, split: str) -> None:
    """Raises DataError where the rows of a split have nothing to be scored by."""
    if not len(next(task.batches(split, 1)).labels):
        raise DataError(
            f"the rows of {split} have no labels to be scored by; write what is predicted "
            "of them with --predictions."
        )


def outputs(
    model: nn.Module, task: Task, split: str, batch_size: int, device: torch.device
) -> Tensor:
    """What `model` says of each row of a split, dropout off: (rows, outputs), in their order."""
    found, rows = [], []
    for batch, answer in _answers(model, task, split, batch_size, device):
        found.append(answer)
        rows += batch.rows
    return torch.cat(found)[torch.tensor(rows).argsort()]


def _answers(
    model: nn.Module, task: Task, split: str, batch_size: int, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch of a split with what the model says of it; the longest rows first."""
    training = model.training
    model.eval()
    try:
        batches, what = task.batches(split, batch_size), f"{split} rows answered"
        for batch in paced(batches, what, task.rows(split), lambda batch: len(batch.rows)):
            with torch.no_grad():
                yield batch, task.predict(model, batch.to(device)).cpu()
    finally:
        model.train(training)

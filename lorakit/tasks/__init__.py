"""What is learnt and how it is scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import torch
from pydantic import PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from lorakit.data import DataSection, dialogues, labels, read
from lorakit.data.batching import Batch
from lorakit.data.formats import Wanted, fields
from lorakit.errors import DataError, no_such
from lorakit.models.heads import Head
from lorakit.schema import Section
from lorakit.tasks import glue
from lorakit.tasks.causal import CausalTask, LossOn
from lorakit.tasks.classification import Classification
from lorakit.tasks.multilabel import MultiLabel
from lorakit.tasks.regression import Regression, pearson, rmse, spearman
from lorakit.tasks.seq2seq import Seq2SeqTask
from lorakit.tasks.texts import TextTask
from lorakit.tasks.tokens import TokenTask


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
        if name is None or value == cls.model_fields[field].default or field in HEARD.get(name, ()):
            return value
        hearing = [other for other in OWN if field in HEARD.get(other, ())] or ["GLUE's tasks"]
        raise ValueError(f"{name} would ignore it; it is for {' and '.join(hearing)}")

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
        return OWN[section.name](section, data)
    splits = glue.read(section.name, section.data_dir)
    return TextTask(splits, section.max_length, glue.TASKS[section.name].objective)


def _classification(section: TaskSection, data: DataSection) -> Task:
    splits = read(data, labels.ONE)
    return TextTask(splits, section.max_length, Classification(splits.labels))


def _regression(section: TaskSection, data: DataSection) -> Task:
    if data.labels is not None:
        raise DataError("data.labels: regression has none; what it learns are numbers.")
    metrics = (pearson, spearman, rmse)
    return TextTask(read(data, labels.NUMBER), section.max_length, Regression(metrics))


def _multi_label(section: TaskSection, data: DataSection) -> Task:
    splits = read(data, labels.SEVERAL)
    return TextTask(splits, section.max_length, MultiLabel(splits.labels))


def _tokens(section: TaskSection, data: DataSection) -> Task:
    if isinstance(data.text, tuple):
        raise DataError("data.text: token-classification expects one column, of lists of words.")
    return TokenTask(read(data, labels.TAGS), section.max_length)


def _wanted(section: TaskSection, data: DataSection) -> Wanted:
    """What the recipe says of the columns of rows whose answer is text.

    Raises:
        DataError: a setting would be ignored.

    """
    if data.labels is not None:
        raise DataError(f"data.labels: {section.name} has none; its answers are texts.")
    if isinstance(data.text, tuple):
        raise DataError("data.text: expected one column; several go into task.template.")
    named = None if section.format == "auto" else section.format
    return Wanted(named, section.template, data.text, data.label)


def _causal(section: TaskSection, data: DataSection) -> Task:
    splits = dialogues.read(data, _wanted(section, data))
    if section.generate is not None and splits.rows["train"].format == "text":
        raise DataError("task.generate: rows are read as text: they have no prompts to answer.")
    told = section.generate, section.loss_on, section.packing
    return CausalTask(splits, section.max_length, *told)


def _seq2seq(section: TaskSection, data: DataSection) -> Task:
    splits = dialogues.read(data, _wanted(section, data))
    if (found := splits.rows["train"].format) not in ("prompt", "alpaca"):
        raise DataError(f"task.format: seq2seq needs prompts with completions; rows are {found}.")
    return Seq2SeqTask(splits, section.max_length, section.generate)


def settled(section: TaskSection, data: DataSection | None) -> TaskSection:
    """The section with what it leaves to be found from the rows, as far as prompts depend on it.

    So a run's recipe says what a text is to be prompted with, when its rows are not at hand.

    Raises:
        DataError: the training rows are missing, or no format fits them.

    """
    if data is None or section.format != "auto" or "format" not in HEARD.get(section.name, ()):
        return section
    found = dialogues.format_of(data, _wanted(section, data))
    return section.model_copy(update={"format": found})


OWN: Mapping[str, Callable[[TaskSection, DataSection], Task]] = {
    "classification": _classification,
    "regression": _regression,
    "multi-label": _multi_label,
    "token-classification": _tokens,
    "causal-lm": _causal,
    "seq2seq": _seq2seq,
}
"""Tasks whose rows come from the `data` section, by name."""

HEARD: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(glue.TASKS, ("data_dir",)),
    "causal-lm": ("format", "template", "loss_on", "packing", "generate"),
    "seq2seq": ("format", "template", "generate"),
}
"""The settings that only some tasks listen to, by the task's name."""


def evaluate(
    model: nn.Module, task: Task, split: str, batch_size: int, device: torch.device
) -> dict[str, float]:
    """The task's metrics on a split, dropout off; leaves the model in the mode it was in.

    Every process scores all rows: no gathering, and the same decision everywhere.

    Raises:
        DataError: the rows have no labels.

    """
    found, labels = [], []
    for batch, answer in _answers(model, task, split, batch_size, device, scored=True):
        found.append(answer)
        labels.append(batch.labels)
    return task.score(torch.cat(found), torch.cat(labels))


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
    model: nn.Module,
    task: Task,
    split: str,
    batch_size: int,
    device: torch.device,
    scored: bool = False,
) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch of a split with what the model says of it; the longest rows first."""
    training = model.training
    model.eval()
    try:
        for batch in task.batches(split, batch_size):
            if scored and not len(batch.labels):
                raise DataError(
                    f"the rows of {split} have no labels to be scored by; write what is predicted "
                    "of them with --predictions."
                )
            with torch.no_grad():
                yield batch, task.predict(model, batch.to(device)).cpu()
    finally:
        model.train(training)

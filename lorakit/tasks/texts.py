"""What every task shares that has one answer for each text, or for each pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from lorakit.data.batching import Batch, Encoded
from lorakit.data.encoding import encode
from lorakit.data.rows import Rows
from lorakit.errors import DataError
from lorakit.models.heads import Head
from lorakit.tasks.rows import RowTask

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
"""Of the truth and the guesses, row by row; in percent unless it is an error, and named by its
function's name."""


class Objective(Protocol):
    """What an answer is, what a wrong one costs, and how guesses are scored."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All answers, in the order of the head's outputs; empty where an answer is a number."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """What guesses are scored by, the headline first."""

    def head(self) -> Head:
        """The last layer it needs."""

    def check(self, rows: Rows, where: str, several: bool) -> None:
        """Raises DataError for answers it does not know; `several`: also for all the same."""

    def targets(self, labels: Sequence[Any]) -> Tensor:
        """Answers as the rows have them, as `loss` takes them: (rows,) or (rows, outputs)."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over rows: outputs (rows, outputs), targets as `targets` has them."""

    def guesses(self, outputs: Tensor) -> Tensor:
        """What `metrics` compare with the targets, row by row."""


@dataclass(frozen=True)
class TextTask(RowTask[Rows]):
    """Fits `tasks.Task`."""

    objective: Objective

    def head(self) -> Head:
        return self.objective.head()

    def ready(self, tokenizer: Any) -> TextTask:
        """The task with its rows encoded, when they are first asked for.

        Raises:
            DataError: `max_length` leaves no room for a token of each text.

        """
        texts = len(next(iter(self.splits.rows.values())).texts[0])
        special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
        if self.max_length < special + texts:
            raise DataError(
                f"task.max_length: {self.max_length}: expected at least {special + texts}; "
                f"the tokenizer adds {special} special tokens, which count too."
            )
        return replace(self, tokenizer=tokenizer, _encoded={})

    def encode(self, split: str, rows: Rows) -> Encoded:
        targets = self.objective.targets(rows.labels)
        return encode(rows, targets, self.tokenizer, self.max_length, split)

    def items(self, batch: Batch) -> int:
        return len(batch.rows)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.objective.loss(self.predict(model, batch), batch.labels)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**batch.inputs).logits
        return logits.float()

    def metric_names(self) -> tuple[str, ...]:
        return (*(metric.__name__ for metric in self.objective.metrics), "loss")

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        truth, guesses = labels.tolist(), self.objective.guesses(outputs).tolist()
        scores = {metric.__name__: metric(truth, guesses) for metric in self.objective.metrics}
        return {**scores, "loss": float(self.objective.loss(outputs, labels)) / len(labels)}

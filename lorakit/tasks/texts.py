"""What every task shares that has one answer for each text, or for each pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lorakit.data import Splits
from lorakit.data.batching import Batch, Encoded, encode, steps
from lorakit.data.sources import Rows
from lorakit.errors import DataError, nearest
from lorakit.models import Head

Metric = Callable[[Sequence[float], Sequence[float]], float]
"""Of the truth and the guesses, row by row; in percent, and named by its function's name."""

SAMPLE_SEED = 42
"""Draws the rows of `sample`, whatever the run's seed: runs are scored on the same rows."""


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

    def targets(self, labels: Sequence[str]) -> list[int] | list[float]:
        """Answers as the rows have them, as the numbers that `loss` takes."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Summed over rows: outputs (rows, outputs), targets (rows,)."""

    def guesses(self, outputs: Tensor) -> Tensor:
        """(rows,): what `metrics` compare with the targets."""


@dataclass(frozen=True)
class TextTask:
    """Fits `tasks.Task`."""

    splits: Splits
    max_length: int
    objective: Objective
    tokenizer: Any = None
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.splits.notes

    def head(self) -> Head:
        return self.objective.head()

    def ready(self, tokenizer: Any) -> TextTask:
        """The task with its rows encoded, when they are first asked for.

        Raises:
            DataError: `max_length` leaves no room for a token of each text.

        """
        texts = len(self._rows("train").texts[0])
        special = tokenizer.num_special_tokens_to_add(pair=texts == 2)
        if self.max_length < special + texts:
            raise DataError(
                f"task.max_length: {self.max_length}: expected at least {special + texts}; "
                f"the tokenizer adds {special} special tokens, which count too."
            )
        return replace(self, tokenizer=tokenizer, _encoded={})

    def rows(self, split: str) -> int:
        return len(self._rows(split).texts)

    def steps(
        self, batch_size: int, pieces: int, seed: int, start: int = 0
    ) -> Iterator[list[Batch]]:
        rows = self.encoded("train")
        for step in steps(rows.lengths, batch_size, pieces, seed, start):
            yield [rows.batch(piece) for piece in step]

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        rows = self.encoded(split)
        lengths = rows.lengths
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        for i in range(0, len(order), batch_size):
            yield rows.batch(order[i : i + batch_size])

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

    def encoded(self, split: str) -> Encoded:
        """A split's token ids; tokenized when first asked for."""
        if split not in self._encoded:
            rows = self._rows(split)
            targets = self.objective.targets(rows.labels)
            self._encoded[split] = encode(rows, targets, self.tokenizer, self.max_length)
        return self._encoded[split]

    def limited(self, split: str, limit: int | None) -> TextTask:
        """The task with only the first `limit` rows of a split; null: all."""
        count = self.rows(split)
        return self._with_rows(split, range(count if limit is None else min(limit, count)))

    def sample(self, split: str, count: int) -> TextTask:
        """The task with `count` rows of a split, the same at every call."""
        draw = torch.Generator().manual_seed(SAMPLE_SEED)
        order = torch.randperm(self.rows(split), generator=draw).tolist()
        return self._with_rows(split, sorted(order[:count]))

    def _with_rows(self, split: str, numbers: Iterable[int]) -> TextTask:
        rows = self._rows(split).take(numbers)
        splits = self.splits._replace(rows={**self.splits.rows, split: rows})
        return replace(self, splits=splits, _encoded={})

    def _rows(self, split: str) -> Rows:
        if split not in self.splits.rows:
            known = ", ".join(self.splits.rows)
            raise DataError(f"no split {split!r}.{nearest(split, self.splits.rows)} Here: {known}.")
        return self.splits.rows[split]

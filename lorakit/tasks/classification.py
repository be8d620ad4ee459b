"""One label a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorakit.data import Splits
from lorakit.data.batching import Batch, Encoded, encode, steps
from lorakit.errors import DataError, nearest
from lorakit.models import Head

Metric = Callable[[Sequence[int], Sequence[int]], float]


def accuracy(labels: Sequence[int], guesses: Sequence[int]) -> float:
    """Share of rows guessed right, in percent."""
    from sklearn.metrics import accuracy_score

    return 100 * float(accuracy_score(labels, guesses))


def macro_f1(labels: Sequence[int], guesses: Sequence[int]) -> float:
    """Mean over labels of each label's F1, in percent."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(labels, guesses, average="macro", zero_division=0.0))


@dataclass(frozen=True)
class Classification:
    """Fits `tasks.Task`. The loss is the cross-entropy."""

    splits: Splits
    max_length: int
    metrics: tuple[Metric, ...] = (accuracy, macro_f1)
    tokenizer: Any = None
    _encoded: dict[str, Encoded] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        return self.splits.notes

    def head(self) -> Head:
        return Head(self.splits.labels)

    def ready(self, tokenizer: Any) -> Classification:
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
        return cross_entropy(self.predict(model, batch), batch.labels, reduction="sum")

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**batch.inputs).logits
        return logits.float()

    def metric_names(self) -> tuple[str, ...]:
        return (*(metric.__name__ for metric in self.metrics), "loss")

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        guesses, truth = outputs.argmax(dim=-1).tolist(), labels.tolist()
        scores = {metric.__name__: metric(truth, guesses) for metric in self.metrics}
        return {**scores, "loss": float(cross_entropy(outputs, labels))}

    def encoded(self, split: str) -> Encoded:
        """A split's token ids; tokenized when first asked for."""
        if split not in self._encoded:
            ids = {label: i for i, label in enumerate(self.splits.labels)}
            rows = self._rows(split)
            self._encoded[split] = encode(rows, ids, self.tokenizer, self.max_length)
        return self._encoded[split]

    def limited(self, split: str, limit: int | None) -> Classification:
        """The task with only the first `limit` rows of a split; null: all."""
        rows = self._rows(split)
        rows = rows if limit is None else rows.take(range(min(limit, len(rows.texts))))
        splits = self.splits._replace(rows={**self.splits.rows, split: rows})
        return replace(self, splits=splits, _encoded={})

    def _rows(self, split: str) -> Any:
        if split not in self.splits.rows:
            known = ", ".join(self.splits.rows)
            raise DataError(f"no split {split!r}.{nearest(split, self.splits.rows)} Here: {known}.")
        return self.splits.rows[split]

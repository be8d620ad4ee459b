"""What all tasks share whose rows are encoded one by one: splits, samples, the order of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import nn

from lorakit.data import Splits
from lorakit.data.batching import Batch, Encoded, steps
from lorakit.data.rows import AnyRows
from lorakit.errors import DataError, nearest

SAMPLE_SEED = 42
"""Draws the rows of `sample`, whatever the run's seed: runs are scored on the same rows."""

R = TypeVar("R", bound=AnyRows)


@dataclass(frozen=True)
class RowTask(ABC, Generic[R]):
    """The part of `tasks.Task` that does not know what a row is."""

    splits: Splits[R]
    max_length: int
    tokenizer: Any = field(default=None, kw_only=True)
    _encoded: dict[str, Encoded] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def encode(self, split: str, rows: R) -> Encoded:
        """The token ids of a split; `split` is for messages."""

    def check(self, model: nn.Module) -> None:
        """Raises ModelError where the model cannot be taught this; most can."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the rows, and to those of them that were encoded by now."""
        said = [note for encoded in self._encoded.values() for note in encoded.notes]
        return (*self.splits.notes, *said)

    @property
    def origins(self) -> Mapping[str, str | None]:
        """What tells the rows from others of the same name."""
        return self.splits.origins

    def rows(self, split: str) -> int:
        """How many rows a split has; once there is a tokenizer, how many it left."""
        if self.tokenizer is None:
            return len(self._rows(split).places)
        return len(self.encoded(split).lengths)

    def rows_per_epoch(self) -> int:
        return self.rows("train")

    def steps(
        self, batch_size: int, pieces: int, seed: int, start: int = 0
    ) -> Iterator[list[Batch]]:
        rows = self.encoded("train")
        for step in steps(rows.lengths, batch_size, pieces, seed, start):
            yield [rows.batch(piece) for piece in step]

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        rows = self.encoded(split)
        order = rows.lengths.argsort(descending=True, stable=True).tolist()
        for i in range(0, len(order), batch_size):
            yield rows.batch(order[i : i + batch_size])

    def encoded(self, split: str) -> Encoded:
        """A split's token ids; tokenized when first asked for."""
        if split not in self._encoded:
            self._encoded[split] = self.encode(split, self._rows(split))
        return self._encoded[split]

    def limited(self, split: str, limit: int | None) -> Self:
        """The task with only the first `limit` rows of a split; null: all."""
        count = len(self._rows(split).places)
        return self._with_rows(split, range(count if limit is None else min(limit, count)))

    def sample(self, split: str, count: int) -> Self:
        """The task with `count` rows of a split, the same at every call."""
        draw = torch.Generator().manual_seed(SAMPLE_SEED)
        order = torch.randperm(len(self._rows(split).places), generator=draw)
        return self._with_rows(split, sorted(order[:count].tolist()))

    def _with_rows(self, split: str, numbers: Iterable[int]) -> Self:
        rows = self._rows(split).take(numbers)
        splits = self.splits._replace(rows={**self.splits.rows, split: rows})
        return replace(self, splits=splits, _encoded={})

    def _rows(self, split: str) -> R:
        if split not in self.splits.rows:
            known = ", ".join(self.splits.rows)
            raise DataError(f"no split {split!r}.{nearest(split, self.splits.rows)} Here: {known}.")
        return self.splits.rows[split]

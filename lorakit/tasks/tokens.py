"""A label for each word: its first piece is asked, and names of spans are scored as CoNLL does.

Words behind the first begin with a blank, as in running text: to models like RoBERTa a word without
one is the rest of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lorakit.data.batching import Batch, Encoded
from lorakit.data.cache import Chunk
from lorakit.data.encoding import longer, padding, tokenized
from lorakit.data.rows import Rows
from lorakit.errors import DataError
from lorakit.models.heads import Head
from lorakit.tasks.rows import RowTask

MASK = -100
"""The label of a token that is no word's first."""
OUTSIDE = "O"
Span = tuple[int, int, str]
"""First word, the word behind the last, and what it is."""


@dataclass(frozen=True)
class TokenTask(RowTask[Rows]):
    """Fits `tasks.Task`. An item is a word; `Batch.labels` is how many of them each row has."""

    def head(self) -> Head:
        return Head(self.splits.labels, "TOKEN_CLS")

    def ready(self, tokenizer: Any) -> TokenTask:
        """The task with its rows encoded, when they are first asked for.

        Raises:
            DataError: the tokenizer does not tell which word a token is of.

        """
        if not getattr(tokenizer, "is_fast", False):
            raise DataError("token-classification needs a fast tokenizer; this model has none.")
        return replace(self, tokenizer=tokenizer, _encoded={})

    def encode(self, split: str, rows: Rows) -> Encoded:
        numbers = {label: i for i, label in enumerate(self.splits.labels)}

        def chunk(words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> Chunk:
            texts = [[first, *(f" {word}" for word in more)] for first, *more in words]
            settings = {"is_split_into_words": True, "truncation": True}
            encoded = self.tokenizer(texts, **settings, max_length=self.max_length)
            columns = dict(encoded)
            columns["labels"] = [
                list(_first_pieces(encoded.word_ids(i), [numbers[tag] for tag in each]))
                for i, each in enumerate(tags)
            ]
            return Chunk(columns, longer(encoded, [texts], self.tokenizer, self.max_length))

        settings = ["tags", self.splits.labels, self.max_length]
        sources = [rows.texts, rows.labels]
        found, notes = tokenized(sources, chunk, settings, self.tokenizer, split)
        words = torch.tensor([int((row != MASK).sum()) for row in found.columns["labels"]])
        fill = {**padding(found.columns, self.tokenizer), "labels": MASK}
        return Encoded(found.columns, words, fill, notes)

    def items(self, batch: Batch) -> int:
        return int(batch.labels.sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return _losses(self._logits(model, batch), batch.inputs["labels"]).sum()

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, 5): the loss of each row's words, and how many words, and then spans, are right;
        and how many spans were guessed, and are there.
        """
        logits, truth = self._logits(model, batch), batch.inputs["labels"]
        guesses, known = logits.argmax(dim=-1), truth != MASK
        right = (guesses == truth) & known
        spans = [
            self._spans(guessed[words].tolist(), told[words].tolist())
            for guessed, told, words in zip(guesses, truth, known, strict=True)
        ]
        sums = torch.stack([_losses(logits, truth).sum(dim=1), right.sum(dim=1)], dim=1)
        return torch.cat([sums, torch.tensor(spans).to(sums)], dim=1)

    def metric_names(self) -> tuple[str, ...]:
        return (*(("f1",) if self._has_spans() else ()), "accuracy", "loss")

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        """F1 of spans, where labels are of the form B-NAME, I-NAME and O; words guessed right."""
        loss, right, *spans = outputs.double().sum(dim=0).tolist()
        words, (found, guessed, told) = float(labels.sum()), spans
        f1 = 200 * found / (guessed + told) if guessed + told else 0.0
        scores = {"f1": f1, "accuracy": 100 * right / words, "loss": loss / words}
        return {name: scores[name] for name in self.metric_names()}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, tokens, labels), float32."""
        inputs = {key: value for key, value in batch.inputs.items() if key != "labels"}
        logits: Tensor = model(**inputs).logits
        return logits.float()

    def _has_spans(self) -> bool:
        kinds = {label[:2] for label in self.splits.labels if label != OUTSIDE}
        return "B-" in kinds and kinds <= {"B-", "I-"}

    def _spans(self, guesses: Sequence[int], truth: Sequence[int]) -> tuple[int, int, int]:
        """(right, guessed, there) of a row."""
        if not self._has_spans():
            return 0, 0, 0
        names = self.splits.labels
        guessed, told = (set(spans([names[i] for i in each])) for each in (guesses, truth))
        return len(guessed & told), len(guessed), len(told)


def spans(tags: Sequence[str]) -> Iterator[Span]:
    """What B-NAME begins and I-NAME goes on; I-NAME behind anything else begins as well.

    So does CoNLL-2000's own script, and `seqeval` by default.
    """
    start, name = 0, ""
    for i, tag in enumerate([*tags, OUTSIDE]):
        kind, _, own = tag.partition("-")
        if name and (kind != "I" or own != name):
            yield start, i, name
            name = ""
        if own and not name:
            start, name = i, own


def _first_pieces(words: Sequence[int | None], labels: Sequence[int]) -> Iterator[int]:
    """Each token's label: its word's for the first of a word, `MASK` for all others."""
    before = None
    for word in words:
        yield MASK if word is None or word == before else labels[word]
        before = word


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, tokens): the cross-entropy, 0 at tokens without a label."""
    return cross_entropy(logits.transpose(1, 2), labels, ignore_index=MASK, reduction="none")

"""A causal language model: the cross-entropy of each next token, after texts, prompts or chats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from lorakit.data import packing
from lorakit.data.batching import Batch, Encoded, steps
from lorakit.data.cache import Chunk
from lorakit.data.dialogues import Dialogues, Span, spans
from lorakit.data.encoding import NAMES, padding, tokenized
from lorakit.data.packing import Packed, packed
from lorakit.errors import DataError, ModelError
from lorakit.models import probe
from lorakit.models.heads import Head
from lorakit.tasks.generation import begins, unwrapped
from lorakit.tasks.language import MASK, LanguageTask
from lorakit.tasks.words import word_losses

LossOn = Literal["completion", "all"]
LAST = "last_answer"
"""The column that is 1 at the tokens of a row's last answer: that which is written for a score."""


@dataclass(frozen=True)
class CausalTask(LanguageTask):
    """Fits `tasks.Task`.

    Each piece of a row is tokenized by itself, so that a prompt has in training the very tokens
    that it has when it is asked. The last answer ends with the end-of-sequence token, which is a
    target, unless it was cut.
    """

    loss_on: LossOn = "completion"
    packing: bool = False

    def head(self) -> Head:
        return Head(kind="CAUSAL_LM")

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Sees whether what comes later, or stands in another example, changes an answer.

        Raises:
            ModelError: it does.

        """
        ids = probe(model, rows=1, tokens=8)["input_ids"].repeat(3, 1)
        ids[1, 4:], ids[2, :4] = ids[0, :4], ids[0, 4:]
        placed = self.packing and "position_ids" in signature(model.forward).parameters
        at = {"position_ids": (torch.arange(8) % 4).expand(3, 8)} if placed else {}
        logits = model(input_ids=ids, use_cache=False, **at).logits.float()
        allowed = 1e-3 * float(logits.abs().max())
        if (logits[0, :4] - logits[1, :4]).abs().max() > allowed:
            raise ModelError("task.name: causal-lm: the model sees what it is to predict.")
        if self.packing and (logits[0, 4:] - logits[2, 4:]).abs().max() > allowed:
            raise ModelError("task.packing: the model sees from one example into another.")

    def encode(self, split: str, rows: Dialogues) -> Encoded:
        """Rows of which nothing is left to predict, their prompts being too long, are left out.

        Raises:
            DataError: none has anything left; or the tokenizer's chat template takes a row not.

        """
        places = iter(rows.places)

        def chunk(said: Sequence[Sequence[Sequence[str]]]) -> Chunk:
            return self._chunk([self._spans(row, rows, next(places)) for row in said])

        own = self.tokenizer
        settings = [rows.format, own.chat_template, own.bos_token, own.eos_token, self.loss_on]
        found, notes = tokenized([rows.said], chunk, [*settings, self.max_length], own, split)
        labels = found.columns["labels"]
        targets = [int((row != MASK).sum()) for row in labels]
        told = f"{len(rows.said):,} {NAMES.get(split, split)} rows"
        if not targets:
            raise DataError(
                f"task.max_length: {self.max_length}: all {told} have a prompt of as many tokens "
                f"or more, as {rows.places[0]}; nothing of a completion is left to learn."
            )
        if left_out := len(rows.said) - len(targets):
            notes += (
                f"{left_out:,} of {told} were left out: a prompt of {self.max_length} tokens or "
                "more leaves nothing to learn",
            )
        used = {n: c for n, c in found.columns.items() if n != LAST or self.generate is not None}
        fill = {**padding(used, own), "labels": MASK}
        return Encoded(used, torch.tensor(targets), fill, notes)

    def _spans(self, said: Sequence[Sequence[str]], rows: Dialogues, place: str) -> list[Span]:
        try:
            return spans(said, rows.format, self.tokenizer)
        except DataError as error:
            raise DataError(f"{place}: {error}") from None

    def _chunk(self, rows: Sequence[Sequence[Span]]) -> Chunk:
        """The columns of `rows`, but of those without a target."""
        texts = [span.text for row in rows for span in row]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        opening = begins(self.tokenizer)
        columns: dict[str, list[list[int]]] = {
            name: [] for name in ("input_ids", "attention_mask", "labels", LAST)
        }
        cut = 0
        for row in rows:
            whole, learnt, last = self._row(row, [next(ids) for _ in row], opening(row[0].text))
            kept = whole[: self.max_length]
            labels = [i if said else MASK for i, said in zip(kept, learnt, strict=False)]
            if all(label == MASK for label in labels):
                continue
            cut += len(whole) > len(kept)
            columns["input_ids"].append(kept)
            columns["attention_mask"].append([1] * len(kept))
            columns["labels"].append(labels)
            columns[LAST].append(last[: self.max_length])
        return Chunk(columns, cut)

    def _row(
        self, row: Sequence[Span], tokens: Sequence[list[int]], opening: list[int]
    ) -> tuple[list[int], list[bool], list[int]]:
        """Its ids, which of them are targets, and where the last answer is, uncut."""
        eos = self.tokenizer.eos_token_id
        ending = [] if eos in tokens[-1][-2:] else [eos]  # a template may end with it and a line
        parts = [opening, *tokens[:-1], [*tokens[-1], *ending]]
        said = [False, *(span.learnt for span in row)]
        ids = list(chain.from_iterable(parts))
        at = list(chain.from_iterable([s] * len(p) for s, p in zip(said, parts, strict=True)))
        learnt = [True] * len(ids) if self.loss_on == "all" else list(at)
        learnt[0] = False  # nothing stands before it
        return ids, learnt, _last_run(at[: self.max_length], len(ids))

    def rows_per_epoch(self) -> int:
        return len(self._packed.examples) if self.packing else super().rows_per_epoch()

    def steps(
        self, batch_size: int, pieces: int, seed: int, start: int = 0
    ) -> Iterator[list[Batch]]:
        if not self.packing:
            yield from super().steps(batch_size, pieces, seed, start)
            return
        for step in steps(self._packed.lengths, batch_size, pieces, seed, start):
            yield [self._packed.batch(piece) for piece in step]

    @property
    def notes(self) -> tuple[str, ...]:
        said = super().notes
        if self.packing and "train" in self._encoded:
            said += (packing.told(self._packed, self.max_length),)
        return said

    @cached_property
    def _packed(self) -> Packed:
        """The training examples in rows, the same in every epoch."""
        return packed(self.encoded("train"), self.max_length)

    def token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        taken = {name: inputs[name] for name in inputs if name not in ("labels", LAST)}
        labels = inputs["labels"]
        following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), MASK)], dim=1)
        asked = following != MASK
        # logits where there is a target alone: of prompts and padding they may be gigabytes
        if "logits_to_keep" in signature(unwrapped(model).forward).parameters:
            logits = model(**taken, use_cache=False, logits_to_keep=asked).logits
        else:
            logits = model(**taken, use_cache=False).logits[asked]
        losses = word_losses(logits, following[asked])
        return losses, asked.nonzero()[:, 0]

    def asked(self, inputs: dict[str, Tensor]) -> tuple[list[list[int]], list[str]]:
        rows, last = inputs["input_ids"].tolist(), inputs[LAST]
        sizes = inputs["attention_mask"].sum(dim=1).tolist()
        prompts, answers = [], []
        for ids, at, size in zip(rows, last.tolist(), sizes, strict=True):
            start = at.index(1) if 1 in at else size  # an answer may be cut away
            prompts.append(ids[:start])
            answers.append(ids[start : start + sum(at)])
        return prompts, self.tokenizer.batch_decode(answers, skip_special_tokens=True)


def _last_run(at: Sequence[bool], size: int) -> list[int]:
    """1 in the last unbroken run of `at`, 0 elsewhere, `size` numbers."""
    end = max((i for i, said in enumerate(at) if said), default=-1) + 1
    start = end
    while start > 0 and at[start - 1]:
        start -= 1
    return [int(start <= i < end) for i in range(size)]

"""What tasks share whose answer is text: the loss of its tokens, perplexity, written answers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorakit.data.batching import Batch
from lorakit.data.dialogues import Dialogues
from lorakit.errors import DataError
from lorakit.tasks.generation import continued, scores
from lorakit.tasks.rows import RowTask

MASK = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class LanguageTask(RowTask[Dialogues]):
    """The part of `tasks.Task` that does not know how a model is asked.

    An item is a token to predict; `Batch.labels` is how many of them each row has.
    """

    generate: int | None = None
    """New tokens, at most, in the answers that are written for a score; null: none are."""

    @abstractmethod
    def token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of every target, its loss in nats, and the row it is in: (targets,) both."""

    @abstractmethod
    def asked(self, inputs: dict[str, Tensor]) -> tuple[list[list[int]], list[str]]:
        """The prompts of a batch, as token ids, and the right answers."""

    def ready(self, tokenizer: Any) -> Self:
        """The task with its rows encoded, when they are first asked for.

        Raises:
            DataError: the tokenizer has no token that ends a text.

        """
        if tokenizer.eos_token_id is None:
            raise DataError("the model's tokenizer has no token for the end of a text to learn.")
        return replace(self, tokenizer=tokenizer, _encoded={})

    def items(self, batch: Batch) -> int:
        return int(batch.labels.sum())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        losses, _ = self.token_losses(model, batch.inputs)
        return losses.sum()

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """(rows, 1): the loss summed over each row's targets; (rows, 3): and what `scores` says."""
        losses, rows = self.token_losses(model, batch.inputs)
        summed = losses.new_zeros(len(batch.rows)).index_add(0, rows, losses)[:, None]
        if self.generate is None:
            return summed
        prompts, answers = self.asked(batch.inputs)
        written = continued(model, self.tokenizer, prompts, self.generate)
        return torch.cat([summed, scores(answers, written).to(summed.device)], dim=1)

    def metric_names(self) -> tuple[str, ...]:
        return (
            "loss",
            "perplexity",
            *(() if self.generate is None else ("exact_match", "rouge_l")),
        )

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        loss = outputs[:, 0].double().sum() / labels.sum()
        means = [100 * float(column.mean()) for column in outputs[:, 1:].T]  # in percent
        values = [float(loss), float(loss.exp()), *means]
        return dict(zip(self.metric_names(), values, strict=True))

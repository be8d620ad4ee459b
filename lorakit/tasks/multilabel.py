"""Any number of labels a text, or a pair of texts: a sigmoid for each, and metrics of sets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from lorakit.data.labels import check_sets
from lorakit.data.rows import Rows
from lorakit.models.heads import Head
from lorakit.tasks.texts import Metric

Sets = Sequence[Sequence[bool]]


def micro_f1(truth: Sets, guesses: Sets) -> float:
    """F1 over all pairs of a text and a label, in percent."""
    return _f1(truth, guesses, "micro")


def macro_f1(truth: Sets, guesses: Sets) -> float:
    """Mean over labels of each label's F1, in percent; 0 for one that neither has."""
    return _f1(truth, guesses, "macro")


def exact_match(truth: Sets, guesses: Sets) -> float:
    """Share of texts whose labels are guessed right, all of them, in percent."""
    right = sum(list(t) == list(g) for t, g in zip(truth, guesses, strict=True))
    return 100 * right / len(truth)


@dataclass(frozen=True)
class MultiLabel:
    """Fits `texts.Objective`. A label is guessed where its output is above 0."""

    labels: tuple[str, ...]
    metrics: tuple[Metric, ...] = (micro_f1, macro_f1, exact_match)

    def head(self) -> Head:
        return Head(self.labels, multiple=True)

    def check(self, rows: Rows, where: str, several: bool) -> None:
        check_sets(rows, self.labels, where, several)

    def targets(self, labels: Sequence[Sequence[str]]) -> Tensor:
        """(rows, labels): whether a text has a label."""
        numbers = {label: i for i, label in enumerate(self.labels)}
        found = torch.zeros(len(labels), len(self.labels), dtype=torch.bool)
        for row, names in enumerate(labels):
            found[row, [numbers[name] for name in names]] = True
        return found

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The binary cross-entropy, mean over labels, as transformers has it; summed over rows."""
        summed = binary_cross_entropy_with_logits(outputs, targets.float(), reduction="sum")
        return summed / len(self.labels)

    def guesses(self, outputs: Tensor) -> Tensor:
        return outputs > 0


def _f1(truth: Sets, guesses: Sets, average: str) -> float:
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(truth, guesses, average=average, zero_division=0.0))

"""One label a text, or a pair of texts: the cross-entropy, and the metrics of guessed labels."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorakit.data.labels import check_labels
from lorakit.data.rows import Rows
from lorakit.models.heads import Head
from lorakit.tasks.texts import Metric


def accuracy(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """Share of rows guessed right, in percent."""
    from sklearn.metrics import accuracy_score

    return 100 * float(accuracy_score(truth, guesses))


def macro_f1(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """Mean over labels of each label's F1, in percent."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(truth, guesses, average="macro", zero_division=0.0))


def f1(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """F1 of the second of two labels, in percent; 0 where no row has it or is guessed to."""
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(truth, guesses, pos_label=1, zero_division=0.0))


def matthews(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """Matthews' correlation, in percent; 0 where truth or guesses are constant.

    Of more labels than two it is Gorodkin's generalisation (2004), as for GLUE's diagnostics.
    """
    from sklearn.metrics import matthews_corrcoef

    if len({*truth, *guesses}) == 1:  # which scikit-learn warns of
        return 0.0
    return 100 * float(matthews_corrcoef(truth, guesses))


@dataclass(frozen=True)
class Classification:
    """Fits `texts.Objective`."""

    labels: tuple[str, ...]
    metrics: tuple[Metric, ...] = (accuracy, macro_f1)

    def head(self) -> Head:
        return Head(self.labels)

    def check(self, rows: Rows, where: str, several: bool) -> None:
        check_labels(rows, self.labels, where, several)

    def targets(self, labels: Sequence[str]) -> Tensor:
        numbers = {label: i for i, label in enumerate(self.labels)}
        return torch.tensor(array("q", (numbers[label] for label in labels)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="sum")

    def guesses(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=-1)

"""One number a text, or a pair of texts: the squared error, and correlations."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from lorakit.data.labels import check_numbers
from lorakit.data.rows import Rows
from lorakit.models.heads import Head
from lorakit.tasks.texts import Metric

OUTPUT = "score"
"""The name of the head's one output."""


def pearson(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """Pearson's correlation, in percent; 0 where either is constant, which has none."""
    from scipy.stats import pearsonr

    if len(set(truth)) == 1 or len(set(guesses)) == 1:
        return 0.0
    return 100 * float(pearsonr(truth, guesses).statistic)


def spearman(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """Pearson's correlation of the ranks, equal values sharing theirs; in percent."""
    from scipy.stats import rankdata

    return pearson(rankdata(truth).tolist(), rankdata(guesses).tolist())


def rmse(truth: Sequence[float], guesses: Sequence[float]) -> float:
    """Root of the mean squared error, in the labels' own unit; the loss is its square."""
    return sqrt(sum((t - g) ** 2 for t, g in zip(truth, guesses, strict=True)) / len(truth))


@dataclass(frozen=True)
class Regression:
    """Fits `texts.Objective`."""

    metrics: tuple[Metric, ...] = (pearson, spearman)

    @property
    def labels(self) -> tuple[str, ...]:
        return ()

    def head(self) -> Head:
        return Head((OUTPUT,))

    def check(self, rows: Rows, where: str, several: bool) -> None:
        check_numbers(rows, self.labels, where, several)

    def targets(self, labels: Sequence[str]) -> Tensor:
        return torch.tensor(array("f", map(float, labels)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(self.guesses(outputs), targets, reduction="sum")

    def guesses(self, outputs: Tensor) -> Tensor:
        return outputs.squeeze(-1)

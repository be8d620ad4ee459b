"""A regression whose right update is known: a teacher that is the model moved by a low-rank step.

A test bed, never shipped: every variant should find it, and one that learns ranks should drop some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import optim, variants
from lorakit.adapter import Adapter, VariantConfig
from lorakit.data.batching import Batch, steps, steps_in_epoch
from lorakit.engine import Engine
from lorakit.inject import Layers, inject, plan, sites
from lorakit.models.heads import Head
from lorakit.timetable import TrainSection
from lorakit.train import train
from lorakit.trainee import Trainee

WIDTH = 16


class Net(nn.Module):
    """Two linears, one of them wide, and a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.norm = nn.LayerNorm(3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.norm(self.up(x))))
        return y


def net() -> Net:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net()


def teacher(rank: int = 2) -> Net:
    """`net()` with both linears moved by a step of that rank."""
    moved, draw = net(), torch.Generator().manual_seed(2)
    for layer in (moved.up, moved.down):
        m, n = layer.weight.shape
        step = torch.randn(m, rank, generator=draw) @ torch.randn(rank, n, generator=draw)
        layer.weight.data += step / (n * rank) ** 0.5
    return moved.requires_grad_(False)


@dataclass(frozen=True)
class Planted:
    """Fits `tasks.Task`; its score is the mean squared error, under the name `loss`."""

    x: Tensor
    y: Tensor
    notes: tuple[str, ...] = ()
    origins: Mapping[str, str | None] = field(default_factory=dict)

    def head(self) -> Head:
        return Head()

    def check(self, model: nn.Module) -> None:
        pass

    def ready(self, tokenizer: Any) -> Planted:
        return self

    def limited(self, split: str, limit: int | None) -> Planted:
        return self

    def sample(self, split: str, count: int) -> Planted:
        return self

    def rows(self, split: str) -> int:
        return len(self.x) // 2

    def rows_per_epoch(self) -> int:
        return self.rows("train")

    def steps(
        self, batch_size: int, pieces: int, seed: int, start: int = 0
    ) -> Iterator[list[Batch]]:
        for step in steps([1] * self.rows("train"), batch_size, pieces, seed, start):
            yield [self._batch(rows, 0) for rows in step]

    def batches(self, split: str, batch_size: int) -> Iterator[Batch]:
        for i in range(0, self.rows(split), batch_size):
            rows = list(range(i, min(i + batch_size, self.rows(split))))
            yield self._batch(rows, self.rows("train"))

    def items(self, batch: Batch) -> int:
        return len(batch.rows)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch.inputs["x"]) - batch.labels).square().mean(dim=-1).sum()

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        y: Tensor = model(batch.inputs["x"])
        return y

    def metric_names(self) -> tuple[str, ...]:
        return ("loss",)

    def score(self, outputs: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": float((outputs - labels).square().mean())}

    def _batch(self, rows: list[int], offset: int) -> Batch:
        at = [row + offset for row in rows]
        return Batch({"x": self.x[at]}, self.y[at], rows)


def planted(rows: int = 512, rank: int = 2) -> Planted:
    """Half of the rows to train on, half to score."""
    x = torch.randn(2 * rows, WIDTH, generator=torch.Generator().manual_seed(3))
    return Planted(x, teacher(rank)(x))


class Poisoned(Planted):
    """Row 7 has no answer."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch)
        return loss * float("nan") if 7 in batch.rows else loss


class Calls(TorchDispatchMode):
    """Counts the kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.saved: list[int] = []
        self.ticks: list[int] = []

    def tick(self, step: int) -> None:
        self.ticks.append(step)

    def stopping(self) -> bool:
        return False

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def save(self, trainee: Trainee) -> None:
        self.saved.append(trainee.progress.step)

    def scores(self) -> list[float]:
        return [row["loss"] for row in self.rows if "ranks" not in row]


def section(**settings: Any) -> TrainSection:
    """Settings of the loop for a test: short and lively."""
    return TrainSection(
        **{"steps": 60, "batch_size": 16, "lr": 3e-2, "eval_every": None, **settings}
    )


def added(layer: Adapter, x: Tensor) -> Tensor:
    """dW x, for x (rows, n) to (rows, m)."""
    return layer.update(x, x.new_zeros(len(x), layer.m))


def injected(
    model: nn.Module,
    config: VariantConfig,
    ranks: Mapping[str, int] | None = None,
    whole: Sequence[str] = (),
) -> Layers:
    """The adapters of `config` in `model`; but for them and `whole`, its weights are frozen."""
    plans = plan(config, sites(model, config, whole), ranks)
    return inject(model, plans, variants.get(config.variant).layer, config, whole, whole)


def pupil(
    config: VariantConfig, train_section: TrainSection, model: nn.Module | None = None
) -> Trainee:
    """A fresh net under `config`, ready to be trained."""
    model = model or net()
    layers = injected(model, config)
    timetable = train_section.timetable(1)
    controller = variants.get(config.variant).controller(layers, config, timetable.steps)
    return Trainee(model, layers, controller, optim.adamw(model, layers, train_section))


def taught(
    trainee: Trainee,
    train_section: TrainSection,
    task: Planted | None = None,
    engine: Engine | None = None,
    notes: Notes | None = None,
) -> Notes:
    """Trains, and gives what the loop told."""
    task, notes = task or planted(), notes or Notes()
    size = train_section.batch_size * train_section.accumulate
    timetable = train_section.timetable(steps_in_epoch(task.rows("train"), size))
    train(trainee, task, train_section, timetable, 0, engine or Engine(), notes)
    return notes

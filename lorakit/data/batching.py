"""Encoded rows, and the order they are trained in.

The order is a function of (seed, epoch) alone, so a resumed run finds its place by counting steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.cache import Ragged

Numbers = Sequence[int] | NDArray[Any]
T = TypeVar("T")
WINDOW = 100
"""Steps whose rows are sorted by length together. Sorting all would repeat the same batches every
epoch; on SST-2 a window of 100 steps leaves 2 % padding where random batches have half."""
MULTIPLE = 4
"""Batches are of so many tokens, or a multiple. Each new shape has its kernels compiled and kept:
on SST-2, 10 % more padding is paid back in time, and takes 30 % off the memory of a long run."""


class Batch(NamedTuple):
    """Rows padded to the longest of them."""

    inputs: dict[str, Tensor]  # each (rows, tokens)
    labels: Tensor  # (rows,)
    rows: list[int]  # their numbers in the split

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`; a GPU copies it while it computes, since its pages are pinned."""

        def moved(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        inputs = {key: moved(value) for key, value in self.inputs.items()}
        return Batch(inputs, moved(self.labels), self.rows)


@dataclass(frozen=True)
class Encoded:
    """The token ids of a split's rows, unpadded."""

    columns: Mapping[str, Sequence[Numbers]]  # what the model's forward takes, by row
    labels: Tensor  # (rows, …), whole numbers where they number classes; (0,) where there are none
    padding: Mapping[str, int]  # what each column is filled up with
    notes: tuple[str, ...] = ()  # what was done to the rows, to be said

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row, (rows,)."""
        return torch.as_tensor(_lengths(self.columns["input_ids"]))

    @cached_property
    def _longest(self) -> Mapping[str, int]:
        """The longest row of each column: what a model must take in any case."""
        return {name: int(np.max(_lengths(column))) for name, column in self.columns.items()}

    def batch(self, rows: Sequence[int]) -> Batch:
        """`rows`, padded."""
        inputs = {
            name: padded([column[i] for i in rows], self.padding[name], self._longest[name])
            for name, column in self.columns.items()
        }
        return Batch(inputs, self.labels[rows] if len(self.labels) else self.labels, list(rows))


def steps(
    lengths: Sequence[int] | Tensor, batch_size: int, pieces: int, seed: int, start: int = 0
) -> Iterator[list[list[int]]]:
    """Without end from step `start`: for each step, row numbers in `pieces` batches.

    A step's rows do not depend on how many pieces they are cut into, so that accumulation takes
    the same step as a larger batch. The last step of an epoch has what is left, cut evenly, so
    that no process is left without a batch; only of fewer rows than pieces come fewer batches.
    """
    size, tokens = batch_size * pieces, torch.as_tensor(lengths)
    an_epoch = steps_in_epoch(len(lengths), size)
    epoch, skip = divmod(start, an_epoch)
    while True:
        for rows in _epoch(tokens, size, seed, epoch, skip):
            yield list(_cut(rows, pieces))
        epoch, skip = epoch + 1, 0


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Each of endless `items`, made by a thread of its own while the one before it is used.

    That thread computes alone. With helpers of its own there were more of OpenMP's threads than
    cores, for which libgomp has them all sleep between kernels: the main thread waited 1,300 times
    a step for one to wake up, now 3, and a step took 0.94 x as long (0.83 to 1.10 in six pairs;
    MiniLM, 32 short texts, two threads).
    """
    with ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (1,)) as thread:
        coming = thread.submit(next, items)
        while True:
            here, coming = coming.result(), thread.submit(next, items)
            yield here


def steps_in_epoch(rows: int, size: int) -> int:
    """Steps of `size` rows that see every row once, the last perhaps with fewer."""
    return -(-rows // size)


def _epoch(lengths: Tensor, size: int, seed: int, epoch: int, skip: int) -> Iterator[list[int]]:
    """Every row once: shuffled, sorted by length within windows, cut into steps, steps shuffled.

    The first `skip` steps are left out.
    """
    draw = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(lengths), generator=draw)
    for window in order.split(WINDOW * size):
        window.copy_(window[lengths[window].argsort(stable=True)])
    whole = len(order) // size  # a smaller step stands at the end
    steps = torch.randperm(whole, generator=draw).tolist()
    steps += [whole] if whole * size < len(order) else []
    for step in steps[skip:]:
        yield order[step * size : (step + 1) * size].tolist()


def _cut(rows: list[int], pieces: int) -> Iterator[list[int]]:
    """`rows` in `pieces` parts whose sizes differ by one at the most; none of them empty."""
    size, more = divmod(len(rows), pieces)
    start = 0
    for piece in range(min(pieces, len(rows))):
        end = start + size + (piece < more)
        yield rows[start:end]
        start = end


def padded(rows: Sequence[Numbers], value: int, longest: int) -> Tensor:
    """`rows` filled up with `value`, (rows, tokens).

    `tokens` is the next multiple of `MULTIPLE`, but never above `longest`, for which models may
    have no positions.
    """
    tokens = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
    filled = np.full((len(rows), min(tokens, longest)), value, dtype=np.int64)
    for i, row in enumerate(rows):
        filled[i, : len(row)] = row
    return torch.from_numpy(filled)


def _lengths(column: Sequence[Numbers]) -> Numbers:
    return column.lengths if isinstance(column, Ragged) else [*map(len, column)]

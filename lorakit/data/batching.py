"""Encoded rows, and the order they are trained in.

The order is a function of (seed, epoch) alone, so a resumed run finds its place by counting steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorakit.data.cache import Ragged

Numbers = Sequence[int] | NDArray[Any]
WINDOW = 50
"""Steps whose rows are sorted by length together. Sorting all would repeat the same batches every
epoch; on SST-2 a window of 50 steps leaves about 5 % padding where random batches have half."""


class Batch(NamedTuple):
    """Rows padded to the longest of them."""

    inputs: dict[str, Tensor]  # each (rows, tokens)
    labels: Tensor  # (rows,)
    rows: list[int]  # their numbers in the split

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        moved = {key: value.to(device, non_blocking=True) for key, value in self.inputs.items()}
        return Batch(moved, self.labels.to(device, non_blocking=True), self.rows)


class Encoded(NamedTuple):
    """The token ids of a split's rows, unpadded."""

    columns: Mapping[str, Sequence[Numbers]]  # what the model's forward takes, by row
    labels: Tensor  # (rows, …), whole numbers where they number classes; (0,) where there are none
    padding: Mapping[str, int]  # what each column is filled up with
    notes: tuple[str, ...] = ()  # what was done to the rows, to be said

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, (rows,)."""
        ids = self.columns["input_ids"]
        return torch.as_tensor(ids.lengths if isinstance(ids, Ragged) else [*map(len, ids)])

    def batch(self, rows: Sequence[int]) -> Batch:
        """`rows`, padded."""
        inputs = {
            key: _padded([column[i] for i in rows], self.padding[key])
            for key, column in self.columns.items()
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


def _padded(rows: Sequence[Numbers], value: int) -> Tensor:
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)

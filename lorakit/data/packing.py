"""Several examples in one row, none of which sees another.

A row has no attention mask: positions that start anew at 0 tell transformers where the next example
begins, and it lets no token see across (`masking_utils.find_packed_sequence_indices`). Padding is
at position 0 everywhere, so each token of it stands alone. The first token of an example is never a
target, so nothing is predicted across either.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lorakit.data.batching import Batch, Encoded, padded


@dataclass(frozen=True)
class Packed:
    """Rows of examples, joined when a batch asks for them."""

    encoded: Encoded
    examples: list[list[int]]
    """The numbers of those in each row."""

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each row, (rows,)."""
        each = self.encoded.lengths
        return torch.stack([each[row].sum() for row in self.examples])

    def batch(self, rows: Sequence[int]) -> Batch:
        """`rows`, padded; the batch's own numbers are those of its examples."""
        chosen, given = [self.examples[row] for row in rows], self.encoded.columns
        each, longest = self.encoded.lengths, int(self.lengths.max())
        joined = {
            name: [np.concatenate([given[name][i] for i in row]) for row in chosen]
            for name in ("input_ids", "labels")
        }
        joined["position_ids"] = [
            np.concatenate([np.arange(int(each[i])) for i in row]) for row in chosen
        ]
        fill = {**self.encoded.padding, "position_ids": 0}
        inputs = {name: padded(column, fill[name], longest) for name, column in joined.items()}
        targets = torch.stack([self.encoded.labels[row].sum() for row in chosen])
        return Batch(inputs, targets, [i for row in chosen for i in row])


def packed(encoded: Encoded, size: int) -> Packed:
    """Examples with the columns `input_ids` and `labels`, in rows of at most `size` tokens."""
    return Packed(encoded, best_fit(encoded.lengths.tolist(), size))


def told(rows: Packed, size: int) -> str:
    """What was done, and how full rows of `size` tokens are."""
    full = int(rows.encoded.lengths.sum()) / (len(rows.examples) * size)
    return (
        f"{len(rows.encoded.lengths):,} training rows are packed into {len(rows.examples):,} of "
        f"{size} tokens, {full:.0%} full"
    )


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of `lengths` in bins of `size`: each, the longest first, where least room is left.

    Best-fit decreasing takes at most 11/9 of the fewest bins and 4 more (Johnson 1973).
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # left in each bin, and its number; in order
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[i], -1))
        if at == len(room):
            left, number = size, len(bins)
            bins.append([])
        else:
            left, number = room.pop(at)
        bins[number].append(i)
        insort(room, (left - lengths[i], number))
    return bins

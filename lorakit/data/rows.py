"""Rows of texts with labels, however many: what is too much for memory waits in a file."""

from __future__ import annotations

import marshal
from array import array
from collections.abc import Iterable, Iterator, Sequence
from tempfile import SpooledTemporaryFile
from typing import Any, NamedTuple, Protocol, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lorakit.disk import cache_root

T = TypeVar("T")
IN_MEMORY = 2**22
"""Bytes of a column that are held in memory before it moves to a file."""


class Stored(Sequence[T]):
    """Texts, or tuples of texts, in the order they were appended.

    Beyond `IN_MEMORY` bytes they are in a file without a name, which goes with the process; in
    memory stay 8 bytes for each. Reading one takes some microseconds.
    """

    def __init__(self) -> None:
        self._bytes = _Bytes()
        self._numbers: NDArray[np.int64] | None = None

    def append(self, item: T) -> None:
        """Adds one at the end; not to what `take` has given."""
        assert self._numbers is None
        self._bytes.append(as_bytes(item))

    def take(self, indices: NDArray[np.int64]) -> Stored[T]:
        """The items at `indices`, in that order; they are not copied."""
        taken = Stored[T].__new__(Stored)
        taken._bytes = self._bytes
        taken._numbers = indices if self._numbers is None else self._numbers[indices]
        return taken

    def raw(self) -> Iterator[bytes]:
        """The bytes of each item, as they are kept."""
        return map(self._raw, range(len(self)))

    def __iter__(self) -> Iterator[T]:
        return map(marshal.loads, self.raw())

    def __len__(self) -> int:
        return len(self._bytes) if self._numbers is None else len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        item: T = marshal.loads(self._raw(range(len(self))[index]))
        return item

    def _raw(self, index: int) -> bytes:
        return self._bytes.read(index if self._numbers is None else int(self._numbers[index]))


Items = list[T] | Stored[T]


def as_bytes(item: Any) -> bytes:
    """Text, or a tuple of texts; the same for the same.

    Version 0 of marshal has neither references nor interned text, which depend on more than the
    value. JSON took ten times as long.
    """
    return marshal.dumps(item, 0)


class AnyRows(Protocol):
    """Rows of whatever kind."""

    @property
    def places(self) -> Sequence[str]:
        """Where each row stands, for messages."""

    def take(self, indices: Iterable[int]) -> Self:
        """The rows at `indices`, in that order."""


class Rows(NamedTuple):
    """Texts with their labels, in the order of the file."""

    texts: Items[tuple[str, ...]]  # one text a row, or two; the words, where each has a tag
    labels: Items[Any]  # a name or a number, as text; a tuple of names; nothing if unlabelled
    places: Items[str]  # "reviews.csv line 7"
    origin: str
    notes: tuple[str, ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether there is something to learn from and to score by."""
        return len(self.labels) > 0

    def take(self, indices: Iterable[int]) -> Self:
        """The rows at `indices`, in that order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        return self._replace(
            texts=_taken(self.texts, chosen),
            labels=_taken(self.labels, chosen) if self.labelled else self.labels,
            places=_taken(self.places, chosen),
        )


def empty(origin: str) -> Rows:
    """Rows to append to, of any number."""
    return Rows(Stored(), Stored(), Stored(), origin)


def _taken(items: Items[T], chosen: NDArray[np.int64]) -> Items[T]:
    if isinstance(items, Stored):
        return items.take(chosen)
    return [items[i] for i in chosen]


class _Bytes:
    """Byte strings by number."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(IN_MEMORY, dir=str(cache_root()))  # noqa: SIM115 closed by __del__
        self._ends = array("q", [0])

    def append(self, item: bytes) -> None:
        self._file.seek(self._ends[-1])
        self._file.write(item)
        self._ends.append(self._ends[-1] + len(item))

    def read(self, number: int) -> bytes:
        start = self._ends[number]
        self._file.seek(start)
        found: bytes = self._file.read(self._ends[number + 1] - start)
        return found

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __del__(self) -> None:
        self._file.close()

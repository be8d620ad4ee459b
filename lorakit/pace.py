"""How far long work has come, told to whoever listens: work knows no screen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

LOG = logging.getLogger("lorakit")
T = TypeVar("T")


class Pace(NamedTuple):
    """In a record of the log, under `pace`."""

    what: str
    """Is done: `rows scored`."""
    done: int
    total: int

    def __str__(self) -> str:
        return f"{self.done:,} of {self.total:,} {self.what}"


def paced(
    items: Iterable[T], what: str, total: int, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """`items`; when the next is asked for, the last one is told to be done.

    Each counts `size`, and all of them `total`.
    """
    done = 0
    for item in items:
        yield item
        done += size(item)
        pace = Pace(what, done, total)
        LOG.info("%s", pace, extra={"pace": pace})

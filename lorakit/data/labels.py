"""What a column of labels may hold, by the kind of task: how a cell is read, and what is refused.

A label is kept as text (a name, or a number as it was written), or as a tuple of names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite, isnan
from typing import Any

from lorakit.data.rows import Rows
from lorakit.errors import DataError

Label = Any
"""str, or a tuple of str."""


@dataclass(frozen=True)
class Kind:
    """One kind of labels."""

    read: Callable[[Any, str], Label]
    """A cell and the separator of names, to a label; a ValueError says what was expected."""
    check: Callable[[Rows, Sequence[str], str, bool], None]
    """`check_labels`, or one like it."""
    names: Callable[[Label], Iterable[str]] = lambda label: ()
    """The names within a label."""
    by_label: bool = False
    """Whether rows are held out label by label."""
    words: bool = False
    """Whether a text is a list of words, with a label for each."""


def read_one(cell: Any, separator: str) -> str:
    """A name or a number, as text."""
    if isinstance(cell, list | dict):
        raise ValueError(f"holds a {type(cell).__name__}; expected a single label")
    return as_text(cell)


def read_several(cell: Any, separator: str) -> tuple[str, ...]:
    """Names, each once: a list, or text with a separator between them; perhaps none."""
    if isinstance(cell, dict) or cell is None:
        raise ValueError("holds no list of labels" if cell else "holds no value; expected a list")
    parts = cell if isinstance(cell, list) else as_text(cell).split(separator)
    return tuple(dict.fromkeys(name for part in parts if (name := as_text(part))))


def read_tags(cell: Any, separator: str) -> tuple[str, ...]:
    """A name for each word."""
    if not isinstance(cell, list):
        raise ValueError("holds no list; expected a tag for each word, in .json or .parquet")
    if not all(tags := [as_text(tag) for tag in cell]):
        raise ValueError("holds a word without a tag")
    return tuple(tags)


def as_text(cell: Any) -> str:
    """A cell without the blanks around it; 1 where a table of numbers made 1.0 of it.

    Empty for nothing and for NaN.
    """
    if cell is None or (isinstance(cell, float) and isnan(cell)):
        return ""
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell).strip()


def by_number(label: Label, names: Sequence[str]) -> Label:
    """Numbers as names, in their order; names, and numbers that are none of one, as they are."""
    if isinstance(label, tuple):
        return tuple(by_number(part, names) for part in label)
    known = label not in names and label.isdecimal() and int(label) < len(names)
    return names[int(label)] if known else label


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names in alphabetical order; numbers by their size."""
    found = set(names)
    numbers = all(name.isdecimal() for name in found)
    return tuple(sorted(found, key=int if numbers else None))


def check_labels(rows: Rows, labels: Sequence[str], where: str, several: bool = True) -> None:
    """Raises DataError for no rows, labels outside `labels`, or (with `several`) only one label."""
    _refuse_none(rows, where)
    counts = Counter(rows.labels)
    if unknown := sorted(set(counts) - set(labels)):
        first = next(i for i, label in enumerate(rows.labels) if label == unknown[0])
        count = sum(counts[u] for u in unknown)
        such = "1 row has" if count == 1 else f"{count:,} rows have"
        raise DataError(
            f"{where}: {rows.places[first]}: label {unknown[0]!r} is not one of "
            f"{', '.join(labels)}; {such} such a label."
        )
    if several and len(counts) == 1:
        raise DataError(
            f"{where}: all {len(rows.texts):,} rows of {rows.origin} have the label "
            f"{rows.labels[0]!r}; a classifier needs at least two."
        )


def check_sets(rows: Rows, labels: Sequence[str], where: str, several: bool = True) -> None:
    """As `check_labels`, for rows with any number of labels, or with one for each word."""
    _refuse_none(rows, where)
    known, counts = set(labels), Counter[tuple[str, ...]]()
    for place, names in zip(rows.places, rows.labels, strict=True):
        if unknown := [name for name in names if name not in known]:
            raise DataError(
                f"{where}: {place}: label {unknown[0]!r} is not one of {', '.join(labels)}."
            )
        counts[tuple(sorted(set(names)))] += 1
    if several and len(set().union(*counts)) < 2:
        raise DataError(
            f"{where}: the rows of {rows.origin} have no two different labels among them; there is "
            "nothing to learn."
        )


def check_numbers(rows: Rows, labels: Sequence[str], where: str, several: bool = True) -> None:
    """Raises DataError for no rows, labels that are no numbers, or (with `several`) only one."""
    _refuse_none(rows, where)
    seen: set[float] = set()
    for place, label in zip(rows.places, rows.labels, strict=True):
        if not _is_finite(label):
            raise DataError(f"{where}: {place}: label {label!r}: expected a finite number.")
        if len(seen) < 2:
            seen.add(float(label))
    if several and len(seen) == 1:
        raise DataError(
            f"{where}: all {len(rows.texts):,} rows of {rows.origin} have the label "
            f"{rows.labels[0]}; there is nothing to learn."
        )


ONE = Kind(read_one, check_labels, lambda label: (label,), by_label=True)
"""One of several names."""
NUMBER = Kind(read_one, check_numbers)
SEVERAL = Kind(read_several, check_sets, iter)
"""Any number of names."""
TAGS = Kind(read_tags, check_sets, iter, words=True)
"""A name for each word."""


def _refuse_none(rows: Rows, where: str) -> None:
    if not rows.texts:
        raise DataError(f"{where}: {rows.origin} holds no rows.")


def _is_finite(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False

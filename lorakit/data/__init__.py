"""Rows of text with labels, from users' own files."""

from collections import Counter
from collections.abc import Sequence, Set
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, NonNegativeInt, field_validator

from lorakit.data.sources import Rows, read_file, read_folder
from lorakit.errors import DataError
from lorakit.places import locate
from lorakit.schema import Section


class DataSection(Section):
    """The rows of a classification task: a .csv, .tsv or .jsonl file, or a folder of folders.

    In the latter each label has its own folder of .txt files.
    """

    train: str
    """A path, or `package:DISTRIBUTION/PATH`."""
    validation: str | None = None
    """As `train`; null: split off from `train`."""
    held_out: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of `train` to split off where `validation` is null, label by label."""
    split_seed: NonNegativeInt = 0
    """Of the split; not the run's seed: runs of several seeds are scored on the same rows."""
    text: str | tuple[str, str] = "text"
    """Column of the text, or columns of a pair of texts."""
    label: str = "label"
    """Column of the label."""
    labels: tuple[str, ...] | None = None
    """All labels, in the order of the head's outputs; null: those of the rows, in alphabetical
    order."""
    deduplicate: bool = True
    """Drop training rows whose text was seen before, or is scored: no text is trained on and
    scored."""

    @field_validator("labels")
    @classmethod
    def _two_or_more(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError("expected two labels or more, none of them twice")
        return labels


class Splits(NamedTuple):
    """What a task gets: rows by split, the labels, and what was done to the rows, to be said."""

    rows: dict[str, Rows]
    labels: tuple[str, ...]
    notes: tuple[str, ...]


def read(section: DataSection) -> Splits:
    """Reads, removes duplicates, splits.

    Raises:
        DataError: files or columns are missing, there are no rows, a label is outside the set, or
            all rows have the same one.

    """
    train, valid = _read(section.train, section, "data.train"), None
    notes = list(train.notes)
    if section.validation is not None:
        valid = _read(section.validation, section, "data.validation")
        notes += valid.notes
    if section.deduplicate:
        train, said = without_duplicates(train, set(_bare(valid)) if valid else set())
        notes += said
    labels = section.labels or tuple(sorted(set(train.labels)))
    check_labels(train, labels, "data.train")
    if valid is None:
        train, valid = split(train, section.held_out, section.split_seed)
    else:
        check_labels(valid, labels, "data.validation", several=False)
    return Splits({"train": train, "validation": valid}, labels, tuple(notes))


def check_labels(rows: Rows, labels: Sequence[str], where: str, several: bool = True) -> None:
    """Raises DataError for no rows, labels outside `labels`, or (with `several`) only one label."""
    if not rows.texts:
        raise DataError(f"{where}: {rows.origin} holds no rows.")
    counts = Counter(rows.labels)
    if unknown := sorted(set(counts) - set(labels)):
        first = rows.labels.index(unknown[0])
        raise DataError(
            f"{where}: {rows.places[first]}: label {unknown[0]!r} is not one of "
            f"{', '.join(labels)}; {sum(counts[u] for u in unknown):,} rows have such a label."
        )
    if several and len(counts) == 1:
        raise DataError(
            f"{where}: all {len(rows.texts):,} rows of {rows.origin} have the label "
            f"{rows.labels[0]!r}; a classifier needs at least two."
        )


def check_numbers(rows: Rows, where: str, several: bool = True) -> None:
    """Raises DataError for no rows, labels that are no numbers, or (with `several`) only one."""
    if not rows.texts:
        raise DataError(f"{where}: {rows.origin} holds no rows.")
    for place, label in zip(rows.places, rows.labels, strict=True):
        if not _is_finite(label):
            raise DataError(f"{where}: {place}: label {label!r}: expected a finite number.")
    if several and len(set(map(float, rows.labels))) == 1:
        raise DataError(
            f"{where}: all {len(rows.texts):,} rows of {rows.origin} have the label "
            f"{rows.labels[0]}; there is nothing to learn."
        )


def _is_finite(text: str) -> bool:
    try:
        return isfinite(float(text))
    except ValueError:
        return False


def without_duplicates(
    rows: Rows, scored: Set[tuple[str, ...]] = frozenset()
) -> tuple[Rows, list[str]]:
    """The first row of every text that is not among the `scored`, and lines that count the others.

    Texts that differ in white space alone are the same: most tokenizers give them the same ids.
    """
    first: dict[tuple[str, ...], int] = {}
    bare, notes = _bare(rows), []
    for i, text in enumerate(bare):
        first.setdefault(text, i)
    if repeated := len(bare) - len(first):
        other = sum(rows.labels[i] != rows.labels[first[text]] for i, text in enumerate(bare))
        note = f"{repeated:,} of {len(bare):,} rows repeat an earlier text and were left out"
        note += f", {other:,} of them with another label" if other else ""
        notes.append(f"{note}: {len(first):,} remain")
    kept = [i for text, i in first.items() if text not in scored]
    if leaked := len(first) - len(kept):
        notes.append(f"{leaked:,} training texts are validation texts too and were left out")
    return rows.take(kept), notes


def _bare(rows: Rows) -> list[tuple[str, ...]]:
    """The texts with all white space as single blanks."""
    return [tuple(" ".join(part.split()) for part in text) for text in rows.texts]


def split(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(train, validation): `share` of the rows of each label, at least one of each, is held out."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    held: set[int] = set()
    for label in sorted(set(rows.labels)):
        members = [i for i, given in enumerate(rows.labels) if given == label]
        order = torch.randperm(len(members), generator=draw).tolist()
        held.update(members[i] for i in order[: max(1, round(share * len(members)))])
    kept = [i for i in range(len(rows.texts)) if i not in held]
    train = rows.take(kept)
    if set(train.labels) != set(rows.labels):
        rare = sorted(set(rows.labels) - set(train.labels))
        raise DataError(
            f"data.train: too few rows to hold some out of each label: {', '.join(rare)} "
            "would have none left to train on."
        )
    return train, rows.take(sorted(held))


def _read(name: str, section: DataSection, where: str) -> Rows:
    path: Path = locate(name, DataError, where)
    if path.is_dir():
        return read_folder(path, where)
    columns = (section.text,) if isinstance(section.text, str) else section.text
    return read_file(path, columns, section.label, where)

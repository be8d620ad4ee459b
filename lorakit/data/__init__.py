"""Rows of text with labels, from users' own files."""

from collections.abc import Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator

from lorakit.data import tables
from lorakit.data.columns import Asked, columns_of, labelled_folder, read_rows
from lorakit.data.labels import Kind, in_order
from lorakit.data.rows import Rows
from lorakit.data.sources import Record, origin, records, splits_of
from lorakit.data.splitting import split, without_duplicates
from lorakit.errors import DataError
from lorakit.places import locate
from lorakit.schema import Section

VALIDATION = "validation"
"""The split that is scored, where a data set has several."""


class DataSection(Section):
    """The rows of every task but GLUE's, from files of your own or a data set of the hub."""

    train: str
    """A .csv, .tsv, .json, .jsonl, .parquet or .txt file; a folder that `datasets` has saved; a
    folder that holds a folder of .txt files for each label; `hub:OWNER/NAME` or
    `hub:OWNER/NAME/CONFIG`. A path may be inside a package: `package:DISTRIBUTION/PATH`."""
    train_split: str | None = None
    """Of a data set that has several; null: `train`."""
    validation: str | None = None
    """As `train`; null: the split `validation` of `train`, if it has one, else `held_out` of its
    rows."""
    validation_split: str | None = None
    """Of `validation`, or of `train` where that is null; null: `validation`."""
    revision: str | None = None
    """A branch, tag or commit of the hub's data set."""
    held_out: float = Field(0.2, gt=0.0, lt=1.0)
    """Share of `train` to split off where nothing else is scored; of single labels, label by
    label."""
    split_seed: NonNegativeInt = 0
    """Of the split; not the run's seed: runs of several seeds are scored on the same rows."""
    text: str | tuple[str, str] | None = None
    """Column of the text, or columns of a pair of texts; null: found by their names, like `text`,
    `sentence1` and `sentence2`, or `tokens`, and said."""
    label: str | None = None
    """Column of the label, of the labels, or of the completion; null: found by its name, like
    `label`, `score` or `completion`, and said."""
    labels: tuple[str, ...] | None = None
    """All labels, in the order of the head's outputs and of the numbers that stand for them in the
    rows; null: those of the training rows, in alphabetical order, numbers by their size."""
    separator: str = Field(",", min_length=1)
    """Stands between the labels of a text where they are written in one cell."""
    deduplicate: bool = True
    """Drop training rows whose text was seen before, or is scored: no text is trained on and
    scored."""

    @field_validator("revision")
    @classmethod
    def _of_the_hub(cls, revision: str | None, others: ValidationInfo) -> str | None:
        named = [others.data.get("train"), others.data.get("validation")]
        if revision is not None and not any(str(name).startswith(tables.HUB) for name in named):
            raise ValueError(f"only a data set of the hub has revisions: {tables.HUB}OWNER/NAME")
        return revision

    @field_validator("labels")
    @classmethod
    def _two_or_more(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
            raise ValueError("expected two labels or more, none of them twice")
        return labels


R = TypeVar("R")


class Splits(NamedTuple, Generic[R]):
    """What a task gets: rows by split, the labels, and what was done to the rows, to be said."""

    rows: dict[str, R]
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    origins: Mapping[str, str | None] = {}
    """By name of a setting or a file, what tells the rows from others: a commit, a digest."""


class Source(NamedTuple):
    """Where the rows of a split are."""

    name: str
    split: str | None
    revision: str | None
    where: str
    """The setting to blame."""

    def records(self) -> Iterator[Record]:
        """They, one at a time; raises DataError as `sources.records`."""
        return records(self.name, self.where, self.split, self.revision)

    def origin(self) -> dict[str, str | None]:
        """By the setting, what tells its rows from others; raises DataError as `origin`."""
        return {self.where: origin(self.name, self.where, self.revision)}


def sources(section: DataSection) -> tuple[Source, Source | None]:
    """Where the training and the validation rows are; None for the latter: a share of the former.

    Raises:
        DataError: they are not there, or the same.

    """
    train = Source(section.train, section.train_split, section.revision, "data.train")
    name, where = section.validation or section.train, f"data.{VALIDATION}"
    known = splits_of(name, where if section.validation else "data.train", section.revision)
    wanted = section.validation_split or (VALIDATION if known else None)
    unnamed = section.validation is None and section.validation_split is None
    if unnamed and (VALIDATION not in known or train.split == VALIDATION):
        return train, None
    if (name, wanted) == (train.name, train.split or (tables.TRAIN if known else None)):
        raise DataError(f"{where}: {name!r}: these are the training rows; null holds some out.")
    return train, Source(name, wanted, section.revision, where)


def settled(section: DataSection, kind: Kind) -> tuple[DataSection, tuple[str, ...]]:
    """The section with the columns that it leaves to be found, and what was found, to be said.

    Raises:
        DataError: the training rows are missing, or none or several columns could be meant.

    """
    if section.text is not None and section.label is not None:
        return section, ()
    (source, _), asked = sources(section), _asked(section, kind)
    if (first := next(_records(source, []), None)) is None:
        return section, ()  # to be refused when its rows are read
    columns = columns_of(first, asked, source.name, source.where)
    text = columns.texts[0] if len(columns.texts) == 1 else columns.texts
    return section.model_copy(update={"text": text, "label": columns.label}), columns.told(asked)


def read(section: DataSection, kind: Kind) -> Splits[Rows]:
    """Reads, removes duplicates, splits.

    Raises:
        DataError: files or columns are missing, there are no rows, or a row is not what the task
            needs, for example of a label outside the set.

    """
    section, told = settled(section, kind)
    source, other = sources(section)
    train, valid = _read(source, _asked(section, kind)), None
    notes, origins = [*told, *train.notes], source.origin()
    if other is not None:
        valid = _read(other, _asked(section, kind))
        notes, origins = [*notes, *valid.notes], origins | other.origin()
        if section.validation is None:
            notes.append(f"validation rows are the split {other.split!r} of {other.name}")
    if section.deduplicate:
        train, said = without_duplicates(train, valid)
        notes += said
    found = (name for label in train.labels for name in kind.names(label))
    labels = section.labels or in_order(found)
    kind.check(train, labels, source.where, True)
    if valid is None:
        strata = train.labels if kind.by_label else None
        train, valid = split(train, section.held_out, section.split_seed, strata)
    else:
        kind.check(valid, labels, f"data.{VALIDATION}", False)
    return Splits({"train": train, VALIDATION: valid}, labels, tuple(notes), origins)


def _asked(section: DataSection, kind: Kind) -> Asked:
    texts = (section.text,) if isinstance(section.text, str) else section.text
    return Asked(texts, section.label, kind, section.separator, section.labels or ())


def _read(source: Source, asked: Asked) -> Rows:
    notes: list[str] = []
    rows = read_rows(_records(source, notes), asked, source.name, source.where)
    return rows._replace(notes=tuple(notes))


def _records(source: Source, notes: list[str]) -> Iterator[Record]:
    """Those of a folder of texts, too; `notes` gets what is to be said of its files."""
    if not source.name.startswith(tables.HUB):
        path = locate(source.name, DataError, source.where)
        if path.is_dir() and not tables.is_saved(path):
            return labelled_folder(path, source.where, notes)
    return source.records()

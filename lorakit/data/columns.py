"""From a file's columns to rows: which hold the texts and the labels, and what is in a cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.data.labels import Kind, as_text, by_number
from lorakit.data.rows import Rows, empty
from lorakit.data.sources import Record
from lorakit.errors import DataError, nearest

TEXTS = ("text", "sentence", "review", "content", "document", "body", "comment", "message", "tweet")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("query", "document"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "answer"),
)
LABELS = ("label", "labels", "target", "class", "category", "score", "sentiment", "topic", "rating")
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "pos_tags", "labels", "label")
"""What columns are mostly called; `text` and `label` are taken whatever else there is."""


class Columns(NamedTuple):
    """The names of a file's columns that are read."""

    texts: tuple[str, ...]
    label: str

    def told(self, asked: Asked) -> tuple[str, ...]:
        """What was found that the recipe does not name, unless it is called as it is here."""
        found = []
        if asked.texts is None and self.texts != ("text",):
            found.append(f"text {' and '.join(map(repr, self.texts))}")
        if asked.label is None and self.label != "label":
            found.append(f"label {self.label!r}")
        return (f"columns found by their names: {', '.join(found)}",) if found else ()


class Asked(NamedTuple):
    """What a recipe says of the columns; None: to be found by their names."""

    texts: tuple[str, ...] | None
    label: str | None
    kind: Kind
    separator: str = ","
    names: tuple[str, ...] = ()
    """All labels, in the order of their numbers, where the recipe lists them."""

    def among(self, known: Sequence[str]) -> Columns:
        """The columns to read, where a file has the columns `known`.

        Raises:
            DataError: one that was named is not there, or none or several could be meant.

        """
        for column in (*(self.texts or ()), *([self.label] if self.label else [])):
            if column not in known:
                raise DataError(
                    f"no column {column!r}.{nearest(column, known)} Columns: {_list(known)}."
                )
        texts = self.texts or text_columns(known, self.kind.words)
        usual = TAGS if self.kind.words else LABELS
        label = self.label or _only([(c,) for c in _called(usual, known)], known, "label", usual)[0]
        return Columns(texts, label)


def columns_of(first: Record, asked: Asked, origin: str, where: str) -> Columns:
    """The columns to read, as the first record of `origin` shows them.

    Raises:
        DataError: as `Asked.among`.

    """
    try:
        return asked.among(list(first.cells))
    except DataError as error:
        raise DataError(f"{where}: {origin}: {error}") from None


def read_rows(records: Iterator[Record], asked: Asked, origin: str, where: str) -> Rows:
    """The rows of `records`.

    Raises:
        DataError: as `Asked.among`; or a cell is empty or not what it should be, with its place.

    """
    rows, first = empty(origin), next(records, None)
    if first is None:
        return rows
    columns = columns_of(first, asked, origin, where)
    for place, cells in chain([first], records):
        try:
            rows.texts.append(_text(cells, columns, asked.kind))
            rows.labels.append(_label(cells, columns, asked))
        except ValueError as error:
            raise DataError(f"{where}: {place}: {error}.") from None
        rows.places.append(place)
        if asked.kind.words and len(rows.texts[-1]) != len(rows.labels[-1]):
            raise DataError(
                f"{where}: {place}: {len(rows.texts[-1])} words, but {len(rows.labels[-1])} tags."
            )
    return rows


def labelled_folder(path: Path, where: str, notes: list[str]) -> Iterator[Record]:
    """The .txt files of a folder that holds a folder of them for every label: `text`, `label`.

    A file that is not UTF-8 is read as Windows-1252, which old corpora are written in; `notes`
    gets a line that counts them.

    Raises:
        DataError: there are no such folders, or a file is empty.

    """
    found, other = False, []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for file in sorted(folder.glob("*.txt")):
            found, name, content = True, f"{folder.name}/{file.name}", file.read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                text = content.decode("cp1252", errors="replace")
                other.append(name)
            if not text.strip():
                raise DataError(f"{where}: {file} is empty.")
            yield Record(name, {"text": text.strip(), "label": folder.name})
    if not found:
        raise DataError(f"{where}: {path} holds no folder of .txt files for each label.")
    if other:
        count = "1 file is" if len(other) == 1 else f"{len(other):,} files are"
        notes.append(f"{count} not UTF-8, read as Windows-1252: {other[0]}")


def text_columns(known: Sequence[str], words: bool) -> tuple[str, ...]:
    """The columns that are called like texts, or like the words of a text.

    Raises:
        DataError: none is, or several could be meant.

    """
    return _words(known) if words else _texts(known)


def _texts(known: Sequence[str]) -> tuple[str, ...]:
    pairs = [pair for usual in PAIRS if len(pair := _called(usual, known)) == 2]
    singles = [(c,) for c in _called(TEXTS, known) if not any(c in pair for pair in pairs)]
    usual = (*TEXTS, *(" + ".join(pair) for pair in PAIRS[:2]))
    return _only([*pairs, *singles], known, "text", usual)


def _words(known: Sequence[str]) -> tuple[str, ...]:
    return _only([(column,) for column in _called(WORDS, known)], known, "text", WORDS)


def _only(
    found: Sequence[tuple[str, ...]], known: Sequence[str], role: str, usual: Sequence[str]
) -> tuple[str, ...]:
    """The one that could be meant; one that is called as its role is, whatever else there is."""
    if (role,) in found:
        return (role,)
    if len(found) == 1:
        return found[0]
    several = ", ".join("+".join(each) for each in found)
    what = f"several could be the {role}: {several}" if found else f"none is called like a {role}"
    hint = "" if found else f" ({', '.join(usual[:4])}, …)"
    raise DataError(f"of the columns {_list(known)} {what}{hint}; name it: data.{role}=COLUMN.")


def _called(usual: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The columns of these names, in their order, however they are capitalised."""
    spelled = {column.strip().lower(): column for column in reversed(known)}
    return tuple(spelled[name] for name in usual if name in spelled)


def _text(cells: Mapping[str, Any], columns: Columns, kind: Kind) -> tuple[str, ...]:
    if kind.words:
        return _word_list(columns.texts[0], cells.get(columns.texts[0]))
    return tuple(_string(column, cells.get(column)) for column in columns.texts)


def _string(column: str, cell: Any) -> str:
    """The text in a cell, as it stands."""
    if isinstance(cell, dict | list):
        raise ValueError(f"{column!r} holds a {type(cell).__name__}, no text")
    if not as_text(cell):
        raise ValueError(f"no value in column {column!r}")
    return str(cell)


def _word_list(column: str, cell: Any) -> tuple[str, ...]:
    if not isinstance(cell, list):
        raise ValueError(f"{column!r} holds no list of words; give them in .json or .parquet")
    if not cell or not all(words := [as_text(word) for word in cell]):
        raise ValueError(f"{column!r} holds {'an empty word' if cell else 'no words'}")
    return tuple(words)


def _label(cells: Mapping[str, Any], columns: Columns, asked: Asked) -> Any:
    try:
        label = asked.kind.read(cells.get(columns.label), asked.separator)
    except ValueError as error:
        raise ValueError(f"column {columns.label!r} {error}") from None
    if label == "":
        raise ValueError(f"no value in column {columns.label!r}")
    return by_number(label, asked.names)


def _list(known: Sequence[str]) -> str:
    return ", ".join(known) or "none"

"""Texts to answer: from the command line, files, or standard input; one at a time."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lorakit.data.columns import text_columns
from lorakit.data.sources import Record, records
from lorakit.errors import DataError, LorakitError, nearest

STDIN = "-"
PAIR = ("text1", "text2")
"""What two texts are called that have no columns."""


class Asked(NamedTuple):
    """How texts are to be read."""

    columns: tuple[str, ...] | None = None
    """Those that hold the texts; null: found by their names."""
    texts: int | None = None
    """How many texts an input has, one or two; null: not known."""
    words: bool = False
    """Whether an input is a text in words, each of which gets an answer."""


class Given(NamedTuple):
    """What the command line says of the texts: they themselves, or a file of them."""

    texts: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    """The second of every pair, where texts come in pairs."""
    file: str | None = None
    """Its name, or `-` for standard input."""
    columns: tuple[str, ...] | None = None

    def inputs(self, asked: "Asked") -> "Iterator[Input]":
        """All inputs, one at a time.

        Raises:
            LorakitError: there are neither texts nor a file, or both, or an option for the other.
            DataError: as `read`.

        """
        file = STDIN if self.texts == (STDIN,) else self.file
        texts = () if self.texts == (STDIN,) else self.texts
        if bool(texts) == (file is not None):
            raise LorakitError(
                "expected one of these: texts, --file with a file of them, - for standard input."
            )
        if self.pairs and not texts:
            raise LorakitError("--pair goes with texts typed here; in files a pair is two columns.")
        if self.columns and (file is None or file == STDIN):
            raise LorakitError("--column goes with --file; texts typed here have none.")
        if len(self.columns or ()) > 2:
            raise LorakitError("--column: expected one, or two that hold a pair.")
        return typed(texts, self.pairs, asked) if file is None else read(file, asked)


class Input(NamedTuple):
    """A text, a pair of texts, or the words of a text, and where it is from."""

    texts: tuple[str, ...]
    cells: dict[str, Any]
    """What is shown beside the answer: all columns of a file, else the texts."""
    place: str
    """`reviews.csv line 7`."""


def typed(texts: Sequence[str], pairs: Sequence[str], asked: Asked) -> Iterator[Input]:
    """Texts from the command line, each with its partner where there are `pairs`.

    Raises:
        LorakitError: there are not as many partners as texts, or not as many texts in an input as
            the model was trained on.

    """
    if pairs and len(pairs) != len(texts):
        raise LorakitError(
            f"--pair: {len(pairs)} given, texts {len(texts)}; give one for each text, in order."
        )
    for number, text in enumerate(texts):
        place = f"text {number + 1}"
        if pairs:
            yield _counted_out((text, pairs[number]), asked, place)
        else:
            yield _of_line(Record(place, {"text": text}), asked)


def read(name: str, asked: Asked) -> Iterator[Input]:
    """The rows of a file, or the lines of standard input, `-`.

    A line is a text; a tab in it divides a pair, where pairs are asked for or nothing is known.

    Raises:
        DataError: it is not there or cannot be read; a column is missing, or several could be
            meant; or a row has not as many texts as the model was trained on.

    """
    if name == STDIN:
        yield from (_of_line(line, asked) for line in _lines("standard input", sys.stdin.buffer))
    elif name.lower().endswith(".txt") and Path(name).is_file():
        with Path(name).expanduser().open("rb") as file:
            yield from (_of_line(line, asked) for line in _lines(Path(name).name, file))
    else:
        yield from _of_columns(records(name, "--file"), asked)


def _lines(name: str, stream: BinaryIO) -> Iterator[Record]:
    """Every line, empty ones too, which a reader of rows would pass over."""
    for number, line in enumerate(stream, start=1):
        place = f"{name} line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: byte {error.start} is not UTF-8; save it as such.") from None
        yield Record(place, {"text": text.rstrip("\r\n")})


def _of_line(line: Record, asked: Asked) -> Input:
    text = line.cells["text"]
    if asked.words:
        return Input(tuple(text.split()), {"text": text}, line.place)
    if not text.strip():
        return Input((), {"text": text}, line.place)
    texts = (text,) if asked.texts == 1 else tuple(text.split("\t"))
    return _counted_out(texts, asked, line.place)


def _counted_out(texts: tuple[str, ...], asked: Asked, place: str) -> Input:
    """One text or two; none where one of them is empty.

    Raises:
        DataError: they are not as many as the model was trained on.

    """
    if len(texts) > 2 or asked.texts not in (None, len(texts)):
        raise DataError(
            f"{place}: {_counted(len(texts))}, where {_wanted(asked.texts)}; on a line a tab "
            "divides two, in a command --pair gives the second."
        )
    names = ("text",) if len(texts) == 1 else PAIR
    there = texts if all(text.strip() for text in texts) else ()
    return Input(there, dict(zip(names, texts, strict=True)), place)


def _of_columns(rows: Iterable[Record], asked: Asked) -> Iterator[Input]:
    columns: tuple[str, ...] | None = None
    for place, cells in rows:
        if columns is None:
            columns = _columns(list(cells), asked)
        yield Input(_texts(cells, columns, asked.words, place), cells, place)


def _columns(known: Sequence[str], asked: Asked) -> tuple[str, ...]:
    for column in asked.columns or ():
        if column not in known:
            raise DataError(
                f"--file: no column {column!r}.{nearest(column, known)} Columns: "
                f"{', '.join(known)}. Name it by --column."
            )
    try:
        columns = asked.columns or text_columns(known, asked.words)
    except DataError as error:
        told = str(error).replace("data.text=COLUMN", "--column COLUMN")  # it knows recipes alone
        raise DataError(f"--file: {told}") from None
    if asked.texts not in (None, len(columns)):
        raise DataError(
            f"--file: the columns {' and '.join(columns)} hold {_counted(len(columns))}, where "
            f"{_wanted(asked.texts)}; name the columns by --column."
        )
    return columns


def _texts(
    cells: Mapping[str, Any], columns: Sequence[str], words: bool, place: str
) -> tuple[str, ...]:
    """What is in the columns; nothing where one of them is empty."""
    found = [cells.get(column) for column in columns]
    if words and isinstance(found[0], list):
        return tuple(map(str, found[0]))
    for column, cell in zip(columns, found, strict=True):
        if isinstance(cell, list | dict):
            raise DataError(f"--file: {place}: {column!r} holds a {type(cell).__name__}, no text.")
    texts = tuple("" if cell is None else str(cell) for cell in found)
    if words:
        return tuple(texts[0].split())
    return texts if all(text.strip() for text in texts) else ()


def _counted(texts: int) -> str:
    return {1: "one text", 2: "two texts"}.get(texts, f"{texts} texts")


def _wanted(texts: int | None) -> str:
    return (
        "at most two are read" if texts is None else f"the model was trained on {_counted(texts)}"
    )

"""Readers of files: each gives rows and where every row stands, for error messages."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from lorakit.errors import DataError, nearest

READERS = (".csv", ".tsv", ".jsonl")
LONGEST = 2**31 - 1
"""Characters in a cell; Python's own limit of 131,072 is less than some documents have."""
_SIGN = {",": "comma", "\t": "tab"}


class Rows(NamedTuple):
    """Texts with their labels, in the order of the file."""

    texts: list[tuple[str, ...]]  # one text a row, or two
    labels: list[str]
    places: list[str]  # "reviews.csv line 7"
    origin: str
    notes: tuple[str, ...] = ()

    def take(self, indices: Iterable[int]) -> Self:
        """The rows at `indices`, in that order."""
        chosen = list(indices)
        return self._replace(
            texts=[self.texts[i] for i in chosen],
            labels=[self.labels[i] for i in chosen],
            places=[self.places[i] for i in chosen],
        )


def read_file(path: Path, text: Sequence[str], label: str, where: str) -> Rows:
    """Rows of a .csv, .tsv or .jsonl file with the columns `text` and `label`.

    Raises:
        DataError: not such a file, not UTF-8, broken, without a column, or with an empty cell.

    """
    readers = {".csv": _csv, ".tsv": _tsv, ".jsonl": _jsonl}
    if path.suffix not in readers:
        raise DataError(f"{where}: {path} is not one of {', '.join(READERS)}, nor a folder.")
    rows = Rows([], [], [], str(path))
    try:
        for line, record in readers[path.suffix](path):
            cells = [_cell(path, line, name, record) for name in (*text, label)]
            rows.texts.append(tuple(cells[:-1]))
            rows.labels.append(cells[-1].strip())
            rows.places.append(f"{path.name} line {line}")
    except UnicodeDecodeError:
        raise DataError(f"{where}: {path} is not UTF-8 text; save it as such.") from None
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read: {error.strerror}.") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return rows


def read_folder(path: Path, where: str) -> Rows:
    """Rows of a folder that holds a folder of .txt files for every label.

    A file that is not UTF-8 is read as Windows-1252, which old corpora are written in.

    Raises:
        DataError: there are no such folders, or a file is empty.

    """
    rows, other = Rows([], [], [], str(path)), []
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for file in sorted(folder.glob("*.txt")):
            content = file.read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                text = content.decode("cp1252", errors="replace")
                other.append(f"{folder.name}/{file.name}")
            if not text.strip():
                raise DataError(f"{where}: {file} is empty.")
            rows.texts.append((text.strip(),))
            rows.labels.append(folder.name)
            rows.places.append(f"{folder.name}/{file.name}")
    if not rows.texts:
        raise DataError(f"{where}: {path} holds no folder of .txt files for each label.")
    if not other:
        return rows
    count = "1 file is" if len(other) == 1 else f"{len(other):,} files are"
    return rows._replace(notes=(f"{count} not UTF-8, read as Windows-1252: {other[0]}",))


def read_unquoted_tsv(
    path: Path, columns: Sequence[str], header: Sequence[str] = ()
) -> Iterator[tuple[int, tuple[str, ...] | None]]:
    """(line, cells of `columns`) of a TSV in which a quote is a letter, as in GLUE's files.

    Read as quoted, a lone `"` swallows every line up to the next one, silently. None stands for the
    cells of a line too short to have them all. `header` is for files that have none of their own.

    Raises:
        DataError: it cannot be read, is not UTF-8, or lacks a column.

    """
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            names = list(header) or file.readline().rstrip("\r\n").split("\t")
            if missing := [column for column in columns if column not in names]:
                raise DataError(_no_column(path, missing[0], names))
            at = [names.index(column) for column in columns]
            for line, content in enumerate(file, start=1 if header else 2):
                if content.strip():
                    cells = content.rstrip("\r\n").split("\t")
                    yield line, tuple(cells[i] for i in at) if len(cells) > max(at) else None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, dict[Any, Any]]]:
    """(line, record), the line being the one that a record starts on."""
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.DictReader(file, delimiter=delimiter, strict=True), 1
        try:
            columns = len(reader.fieldnames or ())
            line = reader.line_num + 1
            for record in reader:
                if None in record:
                    raise DataError(
                        f"{path} line {line}: {columns + len(record[None])} cells, but {columns} "
                        f"columns; put a text that holds a {_SIGN[delimiter]} in double quotes."
                    )
                yield line, record
                line = reader.line_num + 1
        except csv.Error as error:
            what = (
                f"{error}: is a double quote left open?" if "end of data" in str(error) else error
            )
            raise DataError(f"{path} line {line}: {what}") from None


def _tsv(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    return _csv(path, delimiter="\t")


def _jsonl(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                try:
                    record = json.loads(content)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path} line {line}: not JSON: {error.msg}.") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path} line {line}: expected an object, one on each line.")
                yield line, record


def _cell(path: Path, line: int, column: str, record: dict[Any, Any]) -> str:
    """The text in a column.

    Raises:
        DataError: there is no such column, nothing in it, or no text.

    """
    if column not in record:
        raise DataError(_no_column(path, column, list(map(str, record))))
    value = record[column]
    if isinstance(value, dict | list):
        raise DataError(f"{path} line {line}: {column!r} holds a {type(value).__name__}, no text.")
    if value is None or not str(value).strip():
        raise DataError(f"{path} line {line}: no value in column {column!r}.")
    return str(value)


def _no_column(path: Path, column: str, known: Sequence[str]) -> str:
    hint = nearest(column, known)
    return f"{path} has no column {column!r}.{hint} Columns: {', '.join(known) or 'none'}."

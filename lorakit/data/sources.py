"""Readers of files: each gives rows and where every row stands, for error messages."""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from lorakit.errors import DataError, nearest

READERS = (".csv", ".tsv", ".jsonl")


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
            missing = [name for name in (*text, label) if record.get(name) is None]
            if missing:
                raise DataError(f"{where}: {_missing(path, line, missing[0], record)}")
            rows.texts.append(tuple(str(record[name]) for name in text))
            rows.labels.append(str(record[label]))
            rows.places.append(f"{path.name} line {line}")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {path} is not UTF-8 text: {error.reason}.") from None
    except (csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{where}: {path} is broken: {error}.") from None
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read: {error.strerror}.") from None
    return rows


def read_folder(path: Path, where: str) -> Rows:
    """Rows of a folder that holds a folder of .txt files for every label.

    A file that is not UTF-8 is read as Windows-1252, which old corpora are written in.

    Raises:
        DataError: there are no such folders.

    """
    rows, other = Rows([], [], [], str(path)), []
    for folder in sorted(p for p in path.iterdir() if p.is_dir()):
        for file in sorted(folder.glob("*.txt")):
            content = file.read_bytes()
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                text = content.decode("cp1252", errors="replace")
                other.append(f"{folder.name}/{file.name}")
            rows.texts.append((text.strip(),))
            rows.labels.append(folder.name)
            rows.places.append(f"{folder.name}/{file.name}")
    if not rows.texts:
        raise DataError(f"{where}: {path} holds no folder of .txt files for each label.")
    if not other:
        return rows
    count = "1 file is" if len(other) == 1 else f"{len(other):,} files are"
    return rows._replace(notes=(f"{count} not UTF-8, read as Windows-1252: {other[0]}",))


def read_unquoted_tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of a TSV in which a quote is a letter, as in GLUE's files.

    Read as quoted, a lone `"` swallows every line up to the next one, silently.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        header = file.readline().rstrip("\n").split("\t")
        for line, content in enumerate(file, start=2):
            yield line, dict(zip(header, content.rstrip("\n").split("\t"), strict=False))


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        for record in reader:
            yield reader.line_num, record


def _tsv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    return _csv(path, delimiter="\t")


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                try:
                    record = json.loads(content)
                except json.JSONDecodeError as error:
                    raise DataError(f"{path.name} line {line}: not JSON: {error.msg}.") from None
                if not isinstance(record, dict):
                    raise DataError(f"{path.name} line {line}: expected an object.")
                yield line, record


def _missing(path: Path, line: int, column: str, record: dict[str, Any]) -> str:
    if column in record:
        return f"{path} line {line}: no value in column {column!r}."
    known = [str(name) for name in record if name is not None]
    return f"{path} has no column {column!r}.{nearest(column, known)} Columns: {', '.join(known)}."

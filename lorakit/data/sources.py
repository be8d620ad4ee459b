"""Readers of files: each gives rows as they are, and where every row stands, for messages."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lorakit.data import tables
from lorakit.disk import digest
from lorakit.errors import DataError, nearest
from lorakit.places import locate

LONGEST = 2**31 - 1
"""Characters in a cell; Python's own limit of 131,072 is less than some documents have."""
_SIGN = {",": "comma", "\t": "tab"}


class Record(NamedTuple):
    """One row as a file has it."""

    place: str
    """"train.jsonl line 7": where it stands, for messages."""
    cells: dict[str, Any]
    """By column; a list in a .json, .jsonl or .parquet file stays one."""


def records(
    name: str, where: str, split: str | None = None, revision: str | None = None
) -> Iterator[Record]:
    """The rows of `name`, one at a time, whatever it is written in.

    `name` is a .csv, .tsv, .json, .jsonl, .parquet or .txt file; a folder saved by `datasets`; or
    `hub:OWNER/NAME`, `hub:OWNER/NAME/CONFIG`. `where` is the setting to blame, like `data.train`.
    Only saved folders and hub sets have a `split` (null: `train`), and only the latter a
    `revision`. A line of a .txt is one column, `text`.

    Raises:
        DataError: it is not there, cannot be read, or a row is broken; with file and line.

    """
    path = None if name.startswith(tables.HUB) else locate(name, DataError, where)
    try:
        if path is None:
            rows, place = tables.rows(name, tables.hub(name, revision), split), f"{name} row"
        elif path.is_dir() and tables.is_saved(path):
            rows, place = tables.rows(path, tables.saved(path), split), f"{path.name} row"
        else:
            rows, place = _lines(path, split)
        for number, cells in rows:
            yield Record(f"{place} {number}", cells)
    except UnicodeDecodeError:
        assert path is not None
        raise DataError(f"{where}: {_undecodable(path)}") from None
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read: {error.strerror}.") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _lines(path: Path, split: str | None) -> tuple[Iterator[tuple[int, dict[str, Any]]], str]:
    """A file's reader, and what its numbers count."""
    readers = {
        ".csv": (_csv, "line"),
        ".tsv": (_tsv, "line"),
        ".json": (_json, "item"),
        ".jsonl": (_jsonl, "line"),
        ".parquet": (tables.parquet, "row"),
        ".txt": (_txt, "line"),
    }
    if path.suffix.lower() not in readers:
        raise DataError(
            f"{path} is not one of {', '.join(readers)}, nor a folder that `datasets` has saved."
        )
    if split is not None:
        raise DataError(f"{path} is a single file; it has no split {split!r}.")
    read, noun = readers[path.suffix.lower()]
    return read(path), f"{path.name} {noun}"


def splits_of(name: str, where: str, revision: str | None = None) -> tuple[str, ...]:
    """The splits of a hub set or a saved folder; none of anything else.

    Raises:
        DataError: it is not there.

    """
    if not name.startswith(tables.HUB):
        path = locate(name, DataError, where)
        return tables.splits_of_saved(path) if path.is_dir() else ()
    try:
        return tuple(tables.hub(name, revision))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def origin(name: str, where: str, revision: str | None = None) -> str | None:
    """What tells these rows from others of the same name: the commit of a hub's set, null where
    it is not known; else `sha256:` and a digest of what the file or folder holds.

    Raises:
        DataError: it is not there.

    """
    if not name.startswith(tables.HUB):
        return f"sha256:{digest(locate(name, DataError, where))}"
    return tables.commit(tables.hub(name, revision))


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
        raise DataError(_undecodable(path)) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _undecodable(path: Path) -> str:
    """Where a file stops being UTF-8."""
    offset = 0
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path} line {line}: byte {offset + error.start} is not UTF-8 text; save the "
                    "file as such."
                )
            offset += len(content)
    return f"{path} is not UTF-8 text; save the file as such."


def _csv(path: Path, delimiter: str = ",") -> Iterator[tuple[int, dict[Any, Any]]]:
    """(line, cells), the line being the one that a row starts on."""
    csv.field_size_limit(LONGEST)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader, line = csv.DictReader(file, delimiter=delimiter, strict=True), 1
        try:
            columns = reader.fieldnames or ()
            tables.refuse_twice(path, columns)
            line = reader.line_num + 1
            for cells in reader:
                if None in cells:
                    raise DataError(
                        f"{path} line {line}: {len(columns) + len(cells[None])} cells, but "
                        f"{len(columns)} columns; put a text that holds a {_SIGN[delimiter]} in "
                        "double quotes."
                    )
                if reader.line_num > line:
                    _refuse_swallowed(path, line, cells)
                yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            what = (
                f"{error}: is a double quote left open?" if "end of data" in str(error) else error
            )
            raise DataError(f"{path} line {line}: {what}") from None


def _refuse_swallowed(path: Path, line: int, cells: dict[Any, Any]) -> None:
    """Raises DataError where a quoted cell holds a line break and a tab: it is other rows' cells.

    A lone double quote at the start of a cell opens it until the next one, some lines below.
    """
    for column, cell in cells.items():
        if path.suffix.lower() == ".tsv" and cell and "\t" in cell and "\n" in cell:
            raise DataError(
                f"{path} line {line}: column {column!r} goes on over tabs and line breaks up to "
                "the next double quote; write a quote that is a letter twice, within quotes."
            )


def _tsv(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    return _csv(path, delimiter="\t")


def _txt(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                yield line, {"text": content.rstrip("\n")}


def _jsonl(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, start=1):
            if content.strip():
                cells = _parsed(content, path, line)
                if not isinstance(cells, dict):
                    raise DataError(f"{path} line {line}: expected an object, one on each line.")
                yield line, cells


def _json(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    """(item, cells) of a list of objects, or of one under the key `data`; items count from 1."""
    found = _parsed(path.read_text(encoding="utf-8-sig"), path)
    items = found.get("data") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise DataError(f"{path}: expected a list of objects, or one under the key 'data'.")
    for item, cells in enumerate(items, start=1):
        if not isinstance(cells, dict):
            raise DataError(f"{path} item {item}: expected an object.")
        yield item, cells


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """The value of a JSON text: a file, or its `line`."""
    place = f"{path} line {line}" if line else str(path)
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        at = place if line else f"{path} line {error.lineno}"
        raise DataError(f"{at}: not JSON: {error.msg}.") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deep.") from None
    except _TwiceError as error:
        raise DataError(f"{place}: {error}") from None


class _TwiceError(ValueError):
    """A key stands twice in a JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`; json itself keeps the last of two values, silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _TwiceError(f"the key {twice!r} stands twice in an object.")
    return found


def _no_column(path: Path, column: str, known: Sequence[str]) -> str:
    hint = nearest(column, known)
    return f"{path} has no column {column!r}.{hint} Columns: {', '.join(known) or 'none'}."

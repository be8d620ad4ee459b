"""Rows written as they come: .jsonl, .csv or .tsv, whole or not at all."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lorakit.disk import refuse_existing, whole_file
from lorakit.errors import FolderError

Row = Mapping[str, Any]
Write = Callable[[Row], None]
KINDS = (".jsonl", ".csv", ".tsv")


def check(path: Path) -> None:
    """Raises FolderError where `path` is no sheet's name, exists, or cannot be made."""
    if path.suffix.lower() not in KINDS:
        raise FolderError(f"--out: {path}: expected a name that ends in {', '.join(KINDS)}.")
    refuse_existing(path, "Choose another with --out.")
    if not path.absolute().parent.is_dir():
        raise FolderError(f"--out: {path}: there is no folder {path.parent}.")


@contextmanager
def opened(path: Path) -> Iterator[Write]:
    """A function that writes a row; `path` is there when the block ends well.

    In .csv and .tsv the first row's keys are the columns. A table in a cell becomes columns
    `KEY.INNER` there, a list its JSON.
    """
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        yield _lines(file) if path.suffix.lower() == ".jsonl" else _table(file, path)


def _lines(file: TextIO) -> Write:
    def write(row: Row) -> None:
        file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    return write


def _table(file: TextIO, path: Path) -> Write:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    writer: csv.DictWriter[str] | None = None

    def write(row: Row) -> None:
        nonlocal writer
        flat = dict(_flat(row))
        if writer is None:
            writer = csv.DictWriter(file, list(flat), delimiter=delimiter, lineterminator="\n")
            writer.writeheader()
        if strangers := sorted(flat.keys() - set(writer.fieldnames)):
            raise FolderError(
                f"{path}: a later row has columns that the first has not: {', '.join(strangers)}; "
                "write .jsonl."
            )
        writer.writerow(flat)

    return write


def _flat(row: Row) -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat({f"{key}.{inner}": cell for inner, cell in value.items()})
        else:
            yield key, json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value

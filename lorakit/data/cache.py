"""Token ids on disk: written once, read row by row, and used again by the next run.

    CACHE/rows/KEY/header.json      columns, facts, and the SHA-256 of every other file
    CACHE/rows/KEY/COLUMN.i32       the numbers of all rows, one row behind the other
    CACHE/rows/KEY/lengths.npy      how many of them are each row's

CACHE is `disk.cache_root`. Rows are read from the file when a batch asks for them, not mapped:
resident memory does not grow with their number, but for 8 bytes a row.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload
from uuid import uuid4
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from lorakit.disk import cache_root, digest, passing_folder, whole_folder, written
from lorakit.errors import FolderError

HEADER, LENGTHS, FORMAT = "header.json", "lengths.npy", 1
NUMBER = np.dtype("<i4")
Numbers = NDArray[Any]


class Chunk(NamedTuple):
    """Some rows on their way to the disk."""

    columns: Mapping[str, Sequence[Sequence[int]]]
    """Numbers by column and row; a row is as long in every column."""
    cut: int = 0
    """How many of the rows were longer."""


class Entry(NamedTuple):
    """Rows on disk."""

    columns: Mapping[str, Ragged]
    cut: int
    """How many rows were longer than they were allowed to be."""
    reused: bool
    """Whether an earlier run had left them."""


class Ragged(Sequence[Numbers]):
    """A column: for each row as many numbers as it has."""

    def __init__(self, path: Path, ends: Numbers) -> None:
        self._file, self._ends = os.open(path, os.O_RDONLY), ends
        finalize(self, os.close, self._file)

    @property
    def lengths(self) -> Numbers:
        """Numbers in each row."""
        return np.diff(self._ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Numbers: ...
    @overload
    def __getitem__(self, index: slice) -> list[Numbers]: ...
    def __getitem__(self, index: int | slice) -> Numbers | list[Numbers]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = self._ends[index], self._ends[index + 1]
        size = NUMBER.itemsize
        return np.frombuffer(os.pread(self._file, int(end - start) * size, start * size), NUMBER)


def entry(key: str | None, make: Callable[[], Iterator[Chunk]]) -> Entry:
    """The rows of `key`, as an earlier run left them if they are whole; else those of `make`.

    Another process that wants the same rows waits and takes these. Without a key nothing is kept.

    Raises:
        FolderError: they cannot be written.

    """
    folder = cache_root() / "rows" / (key or uuid4().hex)
    with _alone(folder):
        if _is_whole(folder):
            return _open(folder, reused=True)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            if key is None:
                return _unkept(folder, make())
            with whole_folder(folder) as temporary:
                _write(temporary, make())
        except FolderError as error:
            raise FolderError(
                f"{error}\n  Tokens may be kept elsewhere: LORAKIT_CACHE=DIR."
            ) from None
        return _open(folder, reused=False)


def _unkept(folder: Path, chunks: Iterator[Chunk]) -> Entry:
    """The rows of a folder that is gone already: what is open outlives it."""
    passing = folder.with_name(f".{folder.name}.tmp")
    with written(folder), passing_folder(passing):
        _write(passing, chunks)
        return _open(passing, reused=False)


def _write(folder: Path, chunks: Iterator[Chunk]) -> None:
    lengths: list[Numbers] = []
    cut = 0
    files: dict[str, Any] = {}
    try:
        for chunk in chunks:
            cut += chunk.cut
            for name, rows in chunk.columns.items():
                if name not in files:
                    files[name] = (folder / f"{name}.i32").open("wb")
                for row in rows:
                    files[name].write(np.asarray(row, NUMBER).tobytes())
            first = next(iter(chunk.columns.values()))
            lengths.append(np.fromiter(map(len, first), np.int64, len(first)))
    finally:
        for file in files.values():
            file.close()
    np.save(folder / LENGTHS, np.concatenate(lengths))
    digests = {path.name: digest(path) for path in sorted(folder.iterdir())}
    header = {"format": FORMAT, "columns": list(files), "cut": cut, "sha256": digests}
    (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")


def _open(folder: Path, reused: bool) -> Entry:
    header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    ends = np.concatenate([[0], np.load(folder / LENGTHS).cumsum()])
    columns = {name: Ragged(folder / f"{name}.i32", ends) for name in header["columns"]}
    return Entry(columns, header["cut"], reused)


def _is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written."""
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        digests: dict[str, str] = header["sha256"]
        same = all(digest(folder / name) == told for name, told in digests.items())
        return header["format"] == FORMAT and same
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process is at work on `folder`: a lock on one byte of a shared file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("wb") as file:
        _sweep(folder.parent, file)
        with suppress(OSError):  # a file system without locks: then two do the same work
            fcntl.lockf(file, fcntl.LOCK_EX, 1, _byte(folder.name))
        yield


def _sweep(rows: Path, file: BinaryIO) -> None:
    """Removes what processes that were killed have left of any key: its lock is nobody's."""
    for left in rows.glob(".*.tmp"):
        place = 1, _byte(left.name.removeprefix("."))
        with suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, *place)
            shutil.rmtree(left, ignore_errors=True)
            fcntl.lockf(file, fcntl.LOCK_UN, *place)


def _byte(key: str) -> int:
    """The byte of the shared file whose lock a key has."""
    return int(key[:8], 16)

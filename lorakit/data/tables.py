"""Readers of Arrow tables: .parquet files, folders that `datasets` has saved, data sets of the hub.

Numbers of a column that `datasets` knows as class labels become their names; -1, which stands for
an unknown label there, becomes None.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

HUB = "hub:"
TRAIN = "train"
"""The split that is read where none is named."""
_CHUNK = 1_000
"""Rows turned into Python objects together."""

_COMMIT = re.compile(r"[0-9a-f]{40}")

Cells = dict[str, Any]
Name = Callable[[Any], Any]


def parquet(path: Path) -> Iterator[tuple[int, Cells]]:
    """(row, cells) of a .parquet file; rows count from 1.

    Raises:
        DataError: it is none, is broken, or has a column twice.

    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            schema = file.schema_arrow
            refuse_twice(path, schema.names)
            names = _names_in(schema.metadata or {}, schema)
            yield from _rows(file.iter_batches(_CHUNK), names)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read: {_first_line(error)}") from None


def is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved a data set there, or a dictionary of splits."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved(folder: Path) -> Dataset | DatasetDict:
    """What `save_to_disk` has written.

    Raises:
        DataError: it is broken.

    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} cannot be read: {_first_line(error)}") from None


def rows(
    name: object, found: Dataset | DatasetDict, split: str | None
) -> Iterator[tuple[int, Cells]]:
    """(row, cells) of a split; rows count from 1. Pictures and sounds stay undecoded.

    Raises:
        DataError: there is no such split.

    """
    if isinstance(found, Mapping):
        wanted = split or TRAIN
        if wanted not in found:
            hint = nearest(wanted, found)
            raise DataError(f"{name} has no split {wanted!r}.{hint} Here: {', '.join(found)}.")
        found = found[wanted]
    elif split is not None:
        raise DataError(f"{name} is a single data set; it has no split {split!r}.")
    return _rows(found.with_format("arrow").iter(_CHUNK), _names(found.features))


def splits_of_saved(folder: Path) -> tuple[str, ...]:
    """The splits in a saved folder, none where it is a single data set."""
    path = folder / "dataset_dict.json"
    return tuple(json.loads(path.read_text())["splits"]) if path.is_file() else ()


@cache
def hub(name: str, revision: str | None) -> DatasetDict:
    """All splits of `hub:OWNER/NAME` or `hub:OWNER/NAME/CONFIG`.

    Asked for once in a process, so that all its splits are of one commit.

    Raises:
        DataError: there is no such data set, or the hub is not reached.

    """
    from datasets import load_dataset

    owner, config = hub_name(name)
    try:
        return load_dataset(owner, config, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{name!r} cannot be loaded: {_first_line(error)}{_offline()}") from error


def commit(found: DatasetDict) -> str | None:
    """The commit of the hub's repository that `hub` has read; null where its files do not tell.

    `datasets` names the folder of a set's files in its cache by the commit they were made of.
    """
    files = (Path(file["filename"]) for split in found.values() for file in split.cache_files)
    return next((path.parent.name for path in files if _COMMIT.fullmatch(path.parent.name)), None)


def hub_name(name: str) -> tuple[str, str | None]:
    """(OWNER/NAME, CONFIG) of `hub:OWNER/NAME/CONFIG`.

    Raises:
        DataError: it is not made so.

    """
    parts = name.removeprefix(HUB).split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{name!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG.")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None


def refuse_twice(origin: object, columns: Iterable[str]) -> None:
    """Raises DataError where two columns have one name: which of them is meant is not known."""
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise DataError(f"{origin} has two columns of the name {column!r}; rename one.")
        seen.add(column)


def _rows(batches: Iterable[Any], names: Mapping[str, Name]) -> Iterator[tuple[int, Cells]]:
    row = 0
    for batch in batches:
        for cells in batch.to_pylist():
            row += 1
            yield row, {**cells, **{key: name(cells[key]) for key, name in names.items()}}


def _names_in(metadata: Mapping[bytes, bytes], schema: Any) -> dict[str, Name]:
    """What `datasets` has noted in a file it wrote; nothing in other files."""
    if b"huggingface" not in metadata:
        return {}
    from datasets import Features

    return _names(Features.from_arrow_schema(schema))


def _names(features: Mapping[str, Any]) -> dict[str, Name]:
    """How to name the numbers of each column of class labels, or of lists of them."""
    from datasets import ClassLabel

    found: dict[str, Name] = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel):
            found[column] = _namer(feature.names)
        elif isinstance(inner, ClassLabel):
            found[column] = _lister(_namer(inner.names))
    return found


def _namer(names: list[str]) -> Name:
    return lambda number: names[number] if number is not None and number >= 0 else None


def _lister(name: Name) -> Name:
    return lambda numbers: None if numbers is None else [name(number) for number in numbers]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _offline() -> str:
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        return ""
    return "\n  HF_HUB_OFFLINE is set: only data sets already in the cache can be used."

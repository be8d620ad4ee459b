"""GLUE (Wang et al. 2018, arXiv:1804.07461): its tasks in a table, from the hub or a folder."""

from pathlib import Path
from typing import Any, NamedTuple

from lorakit.data import Splits, check_labels
from lorakit.data.sources import Rows, read_unquoted_tsv
from lorakit.errors import DataError
from lorakit.tasks.classification import Metric, accuracy

HUB = "nyu-mll/glue"


class Glue(NamedTuple):
    """One task: where its rows are, and what they mean."""

    folder: str  # in the official layout
    config: str  # on the hub
    text: tuple[str, ...]  # columns, the same in both
    labels: tuple[str, ...]  # names, in the order of the numbers in the files
    metrics: tuple[Metric, ...]


TASKS = {
    "glue/sst2": Glue("SST-2", "sst2", ("sentence",), ("negative", "positive"), (accuracy,)),
}
NAMES = tuple(TASKS)


def read(name: str, data_dir: str | None) -> Splits:
    """The labelled splits of a task: `train`, and `validation`, which GLUE calls dev.

    Raises:
        DataError: the folder lacks the task's files, a row is broken, or the hub is not reached.

    """
    task = TASKS[name]
    splits = {"train": "train", "validation": "dev"}
    if data_dir is None:
        rows = {split: _from_hub(task, split) for split in splits}
    else:
        folder = Path(data_dir).expanduser() / task.folder
        rows = {split: _from_file(task, folder / f"{file}.tsv") for split, file in splits.items()}
    for split, given in rows.items():
        check_labels(given, task.labels, f"task.data_dir: {split}", several=split == "train")
    return Splits(rows, task.labels, ())


def _from_file(task: Glue, path: Path) -> Rows:
    if not path.is_file():
        raise DataError(
            f"task.data_dir: there is no {path}. Expected GLUE's official layout: "
            f"DIR/{task.folder}/train.tsv and dev.tsv, with columns {', '.join(task.text)}, label."
        )
    rows = Rows([], [], [], str(path))
    try:
        for line, record in read_unquoted_tsv(path):
            if missing := [c for c in (*task.text, "label") if c not in record]:
                found = ", ".join(record)
                raise DataError(
                    f"task.data_dir: {path} line {line} has no {missing[0]!r}; it has {found}."
                )
            _append(rows, task, record, f"{path.name} line {line}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task.data_dir: {path} cannot be read: {error}.") from None
    return rows


def _from_hub(task: Glue, split: str) -> Rows:
    from datasets import load_dataset

    try:
        table = load_dataset(HUB, task.config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"task.data_dir: null means the hub's {HUB} ({task.config}), which cannot be loaded: "
            f"{reason}\n  Offline, give a folder in GLUE's official layout: task.data_dir=DIR."
        ) from error
    rows = Rows([], [], [], f"{HUB} {task.config} {split}")
    for i, record in enumerate(table):
        _append(rows, task, record, f"{split} row {i}")
    return rows


def _append(rows: Rows, task: Glue, record: dict[str, Any], place: str) -> None:
    """Adds a row; a label that is no number of a name stays as it is, to be refused by name."""
    label = str(record["label"])
    known = label.isdecimal() and int(label) < len(task.labels)
    rows.texts.append(tuple(record[column] for column in task.text))
    rows.labels.append(task.labels[int(label)] if known else label)
    rows.places.append(place)

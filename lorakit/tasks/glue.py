"""GLUE (Wang et al. 2018, arXiv:1804.07461): its tasks in a table, from the hub or a folder.

Labels, metrics and numbers of rows are the benchmark's own. The folder is as the authors' download
script leaves it: TSV files in which a quote is a letter, without a header for CoLA.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lorakit.data import Splits
from lorakit.data.sources import Rows, read_unquoted_tsv
from lorakit.errors import DataError
from lorakit.tasks.classification import Classification, accuracy, f1, matthews
from lorakit.tasks.regression import Regression
from lorakit.tasks.texts import Objective

HUB, PREFIX = "nyu-mll/glue", "glue/"
ENTAILMENT = ("entailment", "not_entailment")


class Glue(NamedTuple):
    """One task: where its rows are, and what they mean."""

    folder: str
    file: tuple[str, ...]  # columns of the folder's files: the texts, then the label
    hub: tuple[str, ...]  # columns of the texts on the hub, where `label` is the label
    objective: Objective  # labels in the order of their numbers, in files and on the hub
    rows: Mapping[str, tuple[int, ...]]  # by file; more than one where there are several editions
    header: tuple[str, ...] = ()  # of files without one
    torn: bool = False  # whether an edition has rows torn in two by a line break in a text
    whole: str = ""  # a file of train and dev in one, where the task is spread so as well


TASKS = {
    "glue/cola": Glue(
        folder="CoLA",
        file=("sentence", "label"),
        hub=("sentence",),
        objective=Classification(("unacceptable", "acceptable"), (matthews,)),
        rows={"train": (8_551,), "dev": (1_043,)},
        header=("source", "label", "mark", "sentence"),
    ),
    "glue/sst2": Glue(
        folder="SST-2",
        file=("sentence", "label"),
        hub=("sentence",),
        objective=Classification(("negative", "positive"), (accuracy,)),
        rows={"train": (67_349,), "dev": (872,)},
    ),
    "glue/mrpc": Glue(
        folder="MRPC",
        file=("#1 String", "#2 String", "Quality"),
        hub=("sentence1", "sentence2"),
        objective=Classification(("not_equivalent", "equivalent"), (accuracy, f1)),
        rows={"train": (3_668,), "dev": (408,)},
        whole="msr_paraphrase_train.txt",
    ),
    "glue/qqp": Glue(
        folder="QQP",
        file=("question1", "question2", "is_duplicate"),
        hub=("question1", "question2"),
        objective=Classification(("not_duplicate", "duplicate"), (accuracy, f1)),
        rows={"train": (363_846, 363_849), "dev": (40_430, 40_432)},
        torn=True,
    ),
    "glue/stsb": Glue(
        folder="STS-B",
        file=("sentence1", "sentence2", "score"),
        hub=("sentence1", "sentence2"),
        objective=Regression(),
        rows={"train": (5_749,), "dev": (1_500,)},
    ),
    "glue/mnli": Glue(
        folder="MNLI",
        file=("sentence1", "sentence2", "gold_label"),
        hub=("premise", "hypothesis"),
        objective=Classification(("entailment", "neutral", "contradiction"), (accuracy,)),
        rows={"train": (392_702,), "dev_matched": (9_815,), "dev_mismatched": (9_832,)},
    ),
    "glue/qnli": Glue(
        folder="QNLI",
        file=("question", "sentence", "label"),
        hub=("question", "sentence"),
        objective=Classification(ENTAILMENT, (accuracy,)),
        rows={"train": (104_743,), "dev": (5_463,)},
    ),
    "glue/rte": Glue(
        folder="RTE",
        file=("sentence1", "sentence2", "label"),
        hub=("sentence1", "sentence2"),
        objective=Classification(ENTAILMENT, (accuracy,)),
        rows={"train": (2_490,), "dev": (277,)},
    ),
    "glue/wnli": Glue(
        folder="WNLI",
        file=("sentence1", "sentence2", "label"),
        hub=("sentence1", "sentence2"),
        objective=Classification(("not_entailment", "entailment"), (accuracy,)),
        rows={"train": (635,), "dev": (71,)},
    ),
}
NAMES = tuple(TASKS)

SPLITS = {
    "train": ("train",),
    "dev": ("validation",),
    "dev_matched": ("validation_matched", "validation"),
    "dev_mismatched": ("validation_mismatched",),
}
"""What rows are called, by the file they are in: on the hub, and here where that differs."""


def read(name: str, data_dir: str | None) -> Splits:
    """The labelled splits of a task: `train`, `validation`; a note where a size is not GLUE's.

    MNLI's `validation` is the matched one: of the genres that are trained on.

    Raises:
        DataError: the folder lacks the task's files, a row is broken, or the hub is not reached.

    """
    task = TASKS[name]
    notes: list[str] = []
    try:
        files = _from_hub(name) if data_dir is None else _from_folder(task, Path(data_dir))
        for file, rows in files.items():
            split = SPLITS[file][-1]
            task.objective.check(rows, split, several=split == "train")
            notes += [*rows.notes, *_size_note(split, len(rows.texts), task.rows[file])]
    except DataError as error:
        raise DataError(f"task.data_dir: {error}") from error
    splits = {split: rows for file, rows in files.items() for split in SPLITS[file]}
    return Splits(splits, task.objective.labels, tuple(notes))


def _size_note(split: str, rows: int, official: tuple[int, ...]) -> list[str]:
    if rows in official:
        return []
    return [f"{split} has {rows:,} rows, GLUE's has {' or '.join(f'{n:,}' for n in official)}"]


def _from_folder(task: Glue, above: Path) -> dict[str, Rows]:
    """Rows by file."""
    folder = above.expanduser() / task.folder
    if task.whole and (folder / task.whole).is_file() and not (folder / "train.tsv").is_file():
        return _divided(task, folder / task.whole)
    paths = {file: folder / f"{file}.tsv" for file in task.rows}
    if missing := [path for path in paths.values() if not path.is_file()]:
        names = ", ".join(path.name for path in paths.values())
        columns, header = task.header or task.file, "no header, " if task.header else ""
        raise DataError(
            f"there is no {missing[0]}. Expected GLUE's official layout: DIR/{task.folder}/ with "
            f"{names}; {header}columns {', '.join(columns)}."
        )
    return {file: _from_file(task, path) for file, path in paths.items()}


def _divided(task: Glue, whole: Path) -> dict[str, Rows]:
    """Train and dev of MRPC as Microsoft gives it, in one file; GLUE lists the ids of dev."""
    listed, ids = whole.parent / "dev_ids.tsv", ("#1 ID", "#2 ID")
    if not listed.is_file():
        raise DataError(
            f"there is no {listed}, which tells the rows of dev in {whole.name} from those of "
            "train; GLUE's download script fetches it."
        )
    rows = _from_file(task, whole)
    dev = {cells for _, cells in read_unquoted_tsv(listed, ids, header=ids)}
    is_dev = [cells in dev for _, cells in read_unquoted_tsv(whole, ids)]
    return {
        "train": rows.take(i for i, held in enumerate(is_dev) if not held),
        "dev": rows.take(i for i, held in enumerate(is_dev) if held),
    }


def _from_file(task: Glue, path: Path) -> Rows:
    rows, torn = Rows([], [], [], str(path)), []
    for line, cells in read_unquoted_tsv(path, task.file, task.header):
        if cells is not None:
            _append(rows, task, cells[:-1], cells[-1], f"{path.name} line {line}")
        elif task.torn:
            torn.append(line)
        else:
            raise DataError(f"{path} line {line} has fewer cells than columns.")
    if not torn:
        return rows
    note = f"{path.name}: lines left out that are parts of a torn row: {len(torn):,}"
    return rows._replace(notes=(f"{note}, the first of them line {torn[0]}",))


def _from_hub(name: str) -> dict[str, Rows]:
    """Rows by the file they are in where the task is a folder."""
    from datasets import load_dataset

    task, config, found = TASKS[name], name.removeprefix(PREFIX), {}
    for file in task.rows:
        split = SPLITS[file][0]
        try:
            table = load_dataset(HUB, config, split=split)[:]
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(
                f"null means the hub's {HUB} ({config}), which cannot be loaded: {reason}\n"
                "  Offline, give a folder in GLUE's official layout: task.data_dir=DIR."
            ) from error
        rows = Rows([], [], [], f"{HUB} {config} {split}")
        columns = (table[column] for column in (*task.hub, "label"))
        for i, (*texts, label) in enumerate(zip(*columns, strict=True)):
            _append(rows, task, texts, str(label), f"{split} row {i}")
        found[file] = rows
    return found


def _append(rows: Rows, task: Glue, texts: Iterable[str], label: str, place: str) -> None:
    """Adds a row; a label that is no number of a name stays as it is, to be refused by name."""
    names = task.objective.labels
    known = label.isdecimal() and int(label) < len(names)
    rows.texts.append(tuple(texts))
    rows.labels.append(names[int(label)] if known else label)
    rows.places.append(place)

"""GLUE (Wang et al. 2018, arXiv:1804.07461): its tasks in a table, from the hub or a folder.

Labels, metrics and numbers of rows are the benchmark's own. The folder is as the authors' download
script leaves it: TSV files in which a quote is a letter, without a header for CoLA's train and dev.
Test rows have no labels; they are read where they are, to be predicted.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from lorakit.data import Splits, tables
from lorakit.data.labels import by_number
from lorakit.data.rows import Rows, empty
from lorakit.data.sources import read_unquoted_tsv
from lorakit.disk import digest
from lorakit.errors import DataError, Doubt
from lorakit.tasks.classification import Classification, accuracy, f1, matthews
from lorakit.tasks.regression import Regression
from lorakit.tasks.texts import Objective

HUB, PREFIX = "nyu-mll/glue", "glue/"
Origins = Mapping[str, str | None]
ENTAILMENT = ("entailment", "not_entailment")


class Glue(NamedTuple):
    """One task: where its rows are, and what they mean."""

    folder: str
    file: tuple[str, ...]  # columns of the folder's files: the texts, then the label
    hub: tuple[str, ...]  # columns of the texts on the hub, where `label` is the label
    objective: Objective  # labels in the order of their numbers, in files and on the hub
    rows: Mapping[str, tuple[int, ...]]  # by file; more than one where there are several editions
    test: Mapping[str, int]  # rows of each file without labels, which may be missing
    header: tuple[str, ...] = ()  # of labelled files without one
    torn: bool = False  # whether an edition has rows torn in two by a line break in a text
    whole: str = ""  # a file of train and dev in one, where the task is spread so as well
    elsewhere: tuple[str, ...] = ()  # other folders that its files are found in
    asked: tuple[str, ...] = ()  # columns of the texts in files without labels, where they differ

    @property
    def trains(self) -> bool:
        """Whether there are rows to train on; diagnostics are only scored."""
        return "train" in self.rows

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """GLUE's number of rows, by file."""
        return {**self.rows, **{file: (rows,) for file, rows in self.test.items()}}


TASKS = {
    "glue/cola": Glue(
        folder="CoLA",
        file=("sentence", "label"),
        hub=("sentence",),
        objective=Classification(("unacceptable", "acceptable"), (matthews,)),
        rows={"train": (8_551,), "dev": (1_043,)},
        test={"test": 1_063},
        header=("source", "label", "mark", "sentence"),
    ),
    "glue/sst2": Glue(
        folder="SST-2",
        file=("sentence", "label"),
        hub=("sentence",),
        objective=Classification(("negative", "positive"), (accuracy,)),
        rows={"train": (67_349,), "dev": (872,)},
        test={"test": 1_821},
    ),
    "glue/mrpc": Glue(
        folder="MRPC",
        file=("#1 String", "#2 String", "Quality"),
        hub=("sentence1", "sentence2"),
        objective=Classification(("not_equivalent", "equivalent"), (accuracy, f1)),
        rows={"train": (3_668,), "dev": (408,)},
        test={"test": 1_725},
        whole="msr_paraphrase_train.txt",
    ),
    "glue/qqp": Glue(
        folder="QQP",
        file=("question1", "question2", "is_duplicate"),
        hub=("question1", "question2"),
        objective=Classification(("not_duplicate", "duplicate"), (accuracy, f1)),
        rows={"train": (363_846, 363_849), "dev": (40_430, 40_432)},
        test={"test": 390_965},
        torn=True,
    ),
    "glue/stsb": Glue(
        folder="STS-B",
        file=("sentence1", "sentence2", "score"),
        hub=("sentence1", "sentence2"),
        objective=Regression(),
        rows={"train": (5_749,), "dev": (1_500,)},
        test={"test": 1_379},
    ),
    "glue/mnli": Glue(
        folder="MNLI",
        file=("sentence1", "sentence2", "gold_label"),
        hub=("premise", "hypothesis"),
        objective=Classification(("entailment", "neutral", "contradiction"), (accuracy,)),
        rows={"train": (392_702,), "dev_matched": (9_815,), "dev_mismatched": (9_832,)},
        test={"test_matched": 9_796, "test_mismatched": 9_847},
    ),
    "glue/qnli": Glue(
        folder="QNLI",
        file=("question", "sentence", "label"),
        hub=("question", "sentence"),
        objective=Classification(ENTAILMENT, (accuracy,)),
        rows={"train": (104_743,), "dev": (5_463,)},
        test={"test": 5_463},
    ),
    "glue/rte": Glue(
        folder="RTE",
        file=("sentence1", "sentence2", "label"),
        hub=("sentence1", "sentence2"),
        objective=Classification(ENTAILMENT, (accuracy,)),
        rows={"train": (2_490,), "dev": (277,)},
        test={"test": 3_000},
    ),
    "glue/wnli": Glue(
        folder="WNLI",
        file=("sentence1", "sentence2", "label"),
        hub=("sentence1", "sentence2"),
        objective=Classification(("not_entailment", "entailment"), (accuracy,)),
        rows={"train": (635,), "dev": (71,)},
        test={"test": 146},
    ),
    "glue/ax": Glue(
        folder="diagnostic",
        elsewhere=("AX", "MNLI"),
        file=("Premise", "Hypothesis", "Label"),
        asked=("sentence1", "sentence2"),
        hub=("premise", "hypothesis"),
        objective=Classification(("entailment", "neutral", "contradiction"), (matthews, accuracy)),
        rows={"diagnostic-full": (1_104,)},
        test={"diagnostic": 1_104},
    ),
}
NAMES = tuple(name for name, task in TASKS.items() if task.trains)

SPLITS = {
    "train": ("train",),
    "dev": ("validation",),
    "dev_matched": ("validation_matched", "validation"),
    "dev_mismatched": ("validation_mismatched",),
    "diagnostic-full": ("validation", "test"),
    "test": ("test",),
    "test_matched": ("test_matched", "test"),
    "test_mismatched": ("test_mismatched",),
    "diagnostic": ("test",),
}
"""What rows are called, by the file they are in: on the hub, and here where that differs."""


def read(name: str, data_dir: str | None) -> Splits[Rows]:
    """The splits of a task: `train`, `validation`, and `test`, which has no labels, where its file
    is there; a warning where a size is not GLUE's.

    MNLI's `validation` is the matched one: of the genres that are trained on. The diagnostics have
    labels in the authors' full file alone.

    Raises:
        DataError: the folder lacks the task's files, a row is broken, or the hub is not reached.

    """
    task, splits = TASKS[name], dict[str, Rows]()
    notes: list[str] = []
    try:
        files, origins = _from_hub(name) if data_dir is None else _on_disk(task, Path(data_dir))
        for file, rows in files.items():
            split = SPLITS[file][-1]
            if rows.labelled or not rows.texts:
                task.objective.check(rows, split, several=split == "train")
            notes += [*rows.notes, *_size_note(split, len(rows.texts), task.sizes[file])]
    except DataError as error:
        raise DataError(f"task.data_dir: {error}") from error
    for file, rows in files.items():
        for split in SPLITS[file]:
            splits.setdefault(split, rows)
    return Splits(splits, task.objective.labels, tuple(notes), origins)


def _size_note(split: str, rows: int, official: tuple[int, ...]) -> list[str]:
    if rows in official:
        return []
    known = " or ".join(f"{n:,}" for n in official)
    return [Doubt(f"{split} has {rows:,} rows, GLUE's has {known}")]


def _on_disk(task: Glue, above: Path) -> tuple[dict[str, Rows], Origins]:
    """Rows by file, and what tells each file from others of its name."""
    found = _from_folder(task, above)
    paths = {Path(rows.origin) for rows in found.values()}
    return found, {path.name: f"sha256:{digest(path)}" for path in sorted(paths)}


def _from_folder(task: Glue, above: Path) -> dict[str, Rows]:
    """Rows by file, those with labels first."""
    folder = _folder(task, above.expanduser())
    if task.whole and (folder / task.whole).is_file() and not (folder / "train.tsv").is_file():
        found = _divided(task, folder / task.whole)
    else:
        found = {file: _from_file(task, path) for file, path in _labelled(task, folder).items()}
    asked = task._replace(file=(*(task.asked or task.file[:-1]), ""), header=())
    paths = {file: folder / f"{file}.tsv" for file in task.test}
    return found | {f: _from_file(asked, path) for f, path in paths.items() if path.is_file()}


def _folder(task: Glue, above: Path) -> Path:
    """The first of the task's folders that holds one of its files."""
    folders = [above / name for name in (task.folder, *task.elsewhere)]
    held = (each for each in folders if any((each / f"{f}.tsv").is_file() for f in task.sizes))
    return next(held, folders[0])


def _labelled(task: Glue, folder: Path) -> dict[str, Path]:
    """The paths of the files with labels; those of diagnostics may be missing."""
    paths = {file: folder / f"{file}.tsv" for file in task.rows}
    missing = [path for path in paths.values() if not path.is_file()]
    if not task.trains and any((folder / f"{file}.tsv").is_file() for file in task.test):
        return {file: path for file, path in paths.items() if path not in missing}
    if not missing:
        return paths
    names = ", ".join(path.name for path in paths.values())
    columns, header = task.header or task.file, "no header, " if task.header else ""
    raise DataError(
        f"there is no {missing[0]}. Expected GLUE's official layout: DIR/{task.folder}/ with "
        f"{names}; {header}columns {', '.join(columns)}."
    )


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
    """The rows of a file; without labels where the last column has no name."""
    rows, torn = empty(str(path)), []
    *texts, label = task.file
    columns = (*texts, label) if label else texts
    for line, cells in read_unquoted_tsv(path, columns, task.header):
        if cells is not None:
            told = cells[-1] if label else None
            _append(rows, task, cells[: len(texts)], told, f"{path.name} line {line}")
        elif task.torn:
            torn.append(line)
        else:
            raise DataError(f"{path} line {line} has fewer cells than columns.")
    if not torn:
        return rows
    note = f"{path.name}: lines left out that are parts of a torn row: {len(torn):,}"
    return rows._replace(notes=(f"{note}, the first of them line {torn[0]}",))


def _from_hub(name: str) -> tuple[dict[str, Rows], Origins]:
    """Rows by the file they are in where the task is a folder, and the commit they are of."""
    task, found = TASKS[name], {}
    where = f"{tables.HUB}{HUB}/{name.removeprefix(PREFIX)}"
    try:
        splits = tables.hub(where, None)
    except DataError as error:
        raise DataError(
            f"null means the hub: {error}\n"
            "  Offline, give a folder in GLUE's official layout: task.data_dir=DIR."
        ) from error
    for file in (*(task.rows if task.trains else ()), *task.test):
        split = SPLITS[file][0]
        table = splits[split][:]
        rows = empty(f"{where} {split}")
        columns = (table[column] for column in (*task.hub, "label"))
        for i, (*texts, label) in enumerate(zip(*columns, strict=True)):
            told = None if file in task.test else str(label)
            _append(rows, task, texts, told, f"{split} row {i}")
        found[file] = rows
    return found, {where.removeprefix(tables.HUB): tables.commit(splits)}


def _append(rows: Rows, task: Glue, texts: Iterable[str], label: str | None, place: str) -> None:
    """Adds a row; a label that is no number of a name stays as it is, to be refused by name."""
    rows.texts.append(tuple(texts))
    rows.places.append(place)
    if label is not None:
        rows.labels.append(by_number(label, task.objective.labels))

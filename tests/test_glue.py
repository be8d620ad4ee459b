"""GLUE's files as they are: unquoted, numbered labels, each task in a layout of its own."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import yaml
from conftest import SHARED, Answer
from torch.testing import assert_close

from lorakit import models, seal, tasks
from lorakit.errors import DataError
from lorakit.models.heads import Head
from lorakit.tasks import TaskSection, glue
from lorakit.tasks.classification import f1, matthews
from lorakit.tasks.regression import pearson, spearman
from lorakit.trained import logits, open_trained

REAL, SAMPLES = SHARED / "glue", SHARED / "glue_samples"
Lorakit = Callable[..., Answer]

# The official layout of every task: folder, header, a line, and the labels as its files write them
# and as lorakit names them. In a line, a and b are texts and y is the label.
LAYOUTS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "cola": ("CoLA", "", "gj04\t{y}\t*\t{a}", {"0": "unacceptable", "1": "acceptable"}),
    "sst2": ("SST-2", "sentence\tlabel", "{a}\t{y}", {"0": "negative", "1": "positive"}),
    "mrpc": (
        "MRPC",
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{y}\t7{i}\t8{i}\t{a}\t{b}",
        {"0": "not_equivalent", "1": "equivalent"},
    ),
    "qqp": (
        "QQP",
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{i}\t1\t2\t{a}\t{b}\t{y}",
        {"0": "not_duplicate", "1": "duplicate"},
    ),
    "stsb": (
        "STS-B",
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "{i}\tnews\tf\t2012\t1\tnone\tnone\t{a}\t{b}\t{y}",
        {"0.500": "0.500", "4.750": "4.750"},
    ),
    "mnli": (
        "MNLI",
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "{i}\t3\t4\tfiction\t( p )\t( p )\t(S p)\t(S p)\t{a}\t{b}\tneutral\t{y}",
        {name: name for name in ("entailment", "neutral", "contradiction")},
    ),
    "qnli": (
        "QNLI",
        "index\tquestion\tsentence\tlabel",
        "{i}\t{a}\t{b}\t{y}",
        {"entailment": "entailment", "not_entailment": "not_entailment"},
    ),
    "rte": (
        "RTE",
        "index\tsentence1\tsentence2\tlabel",
        "{i}\t{a}\t{b}\t{y}",
        {"entailment": "entailment", "not_entailment": "not_entailment"},
    ),
    "wnli": (
        "WNLI",
        "index\tsentence1\tsentence2\tlabel",
        "{i}\t{a}\t{b}\t{y}",
        {"0": "not_entailment", "1": "entailment"},
    ),
}
SINGLE = ("cola", "sst2")
FILES = {"train": 12, "dev": 6}
MNLI_FILES = {"train": 12, "dev_matched": 6, "dev_mismatched": 3}


def files_of(task: str) -> dict[str, int]:
    return MNLI_FILES if task == "mnli" else FILES


def row(task: str, file: str, i: int) -> tuple[tuple[str, ...], str]:
    """The texts and the written label of a row; the first text tells the label."""
    written = list(LAYOUTS[task][3])[i % len(LAYOUTS[task][3])]
    texts = (f'a "{written} film, {file} {i}', f"another {written} thing")
    return (texts[:1] if task in SINGLE else texts), written


def laid_out(folder: Path, task: str) -> Path:
    """A small `task` below `folder`."""
    name, header, line, _ = LAYOUTS[task]
    (folder / name).mkdir(parents=True, exist_ok=True)
    for file, count in files_of(task).items():
        lines = [header] if header else []
        for i in range(count):
            texts, written = row(task, file, i)
            lines.append(line.format(i=i, a=texts[0], b=texts[-1], y=written))
        (folder / name / f"{file}.tsv").write_text("\n".join(lines) + "\n")
    return folder


TEXT_COLUMNS = {"sentence", "question", "#1 String", "#2 String"} | {
    f"{name}{i}" for name in ("sentence", "question") for i in (1, 2)
}


def unlabelled_of(task: str) -> dict[str, int]:
    return {"test_matched": 4, "test_mismatched": 2} if task == "mnli" else {"test": 4}


def add_tests(folder: Path, task: str) -> None:
    """Files without labels, as GLUE gives them: an index, then columns of texts."""
    name, header, *_ = LAYOUTS[task]
    texts = [c for c in header.split("\t") if c in TEXT_COLUMNS]
    for file, count in unlabelled_of(task).items():
        lines = ["\t".join(["index", *(texts or ["sentence"])])]
        lines += ["\t".join([str(i), *row(task, file, i)[0]]) for i in range(count)]
        (folder / name / f"{file}.tsv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files of all nine tasks."""
    for task in LAYOUTS:
        laid_out(tmp_path / "glue", task)
    return tmp_path / "glue"


def rewrite(folder: Path, task: str, text: str | bytes, name: str = "train") -> None:
    path = folder / LAYOUTS[task][0] / f"{name}.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def refused(folder: Path, task: str) -> str:
    with pytest.raises(DataError) as refusal:
        glue.read(f"glue/{task}", str(folder))
    return str(refusal.value)


def read(folder: Path, task: str) -> Any:
    return glue.read(f"glue/{task}", str(folder))


# files


def test_all_nine_tasks_are_there_and_the_diagnostics() -> None:
    assert set(glue.NAMES) == {f"glue/{task}" for task in LAYOUTS}
    assert {*glue.TASKS} - {*glue.NAMES} == {"glue/ax"}


@pytest.mark.parametrize("task", LAYOUTS)
def test_each_task_is_read_from_its_own_layout(folder: Path, task: str) -> None:
    splits, names = read(folder, task), LAYOUTS[task][3]
    for file, count in files_of(task).items():
        split = {"train": "train", "dev_mismatched": "validation_mismatched"}.get(
            file, "validation"
        )
        given = [row(task, file, i) for i in range(count)]
        assert list(splits.rows[split].texts) == [texts for texts, _ in given]
        assert list(splits.rows[split].labels) == [names[written] for _, written in given]


@pytest.mark.parametrize("task", LAYOUTS)
def test_labels_stand_in_the_order_of_their_numbers(folder: Path, task: str) -> None:
    names = tuple(LAYOUTS[task][3].values())
    assert read(folder, task).labels == (() if task == "stsb" else names)


def test_mnli_has_the_matched_rows_for_validation_under_either_name(folder: Path) -> None:
    rows = read(folder, "mnli").rows
    assert list(rows) == ["train", "validation_matched", "validation", "validation_mismatched"]
    assert rows["validation"] is rows["validation_matched"]
    assert len(rows["validation"].texts) == 6
    assert len(rows["validation_mismatched"].texts) == 3


def test_a_lone_quote_is_a_letter_and_swallows_no_rows(folder: Path) -> None:
    text = 'sentence\tlabel\n"dull\t0\na 6" screen\t1\n"quoted" whole\t0\nlast "\t1\n'
    rewrite(folder, "sst2", text)
    rows = read(folder, "sst2").rows["train"]
    assert list(rows.texts) == [('"dull',), ('a 6" screen',), ('"quoted" whole',), ('last "',)]


@pytest.mark.parametrize("task", LAYOUTS)
def test_line_ends_of_windows_a_byte_order_mark_and_empty_lines_change_nothing(
    folder: Path, task: str
) -> None:
    before = read(folder, task).rows["train"]
    text = (folder / LAYOUTS[task][0] / "train.tsv").read_text()
    rewrite(folder, task, "\ufeff" + text.replace("\n", "\r\n") + "\r\n\n")
    after = read(folder, task).rows["train"]
    assert [*after.texts, *after.labels] == [*before.texts, *before.labels]


def test_a_repeated_text_is_kept_as_everyone_scores_it(folder: Path) -> None:
    rewrite(folder, "sst2", "sentence\tlabel\na\t0\na\t1\na\t0\n")
    assert len(read(folder, "sst2").rows["train"].texts) == 3


@pytest.mark.parametrize(
    ("task", "layout"),
    [
        ("sst2", "DIR/SST-2/ with train.tsv, dev.tsv; columns sentence, label."),
        ("cola", "train.tsv, dev.tsv; no header, columns source, label, mark, sentence."),
        ("mnli", "DIR/MNLI/ with train.tsv, dev_matched.tsv, dev_mismatched.tsv; columns "),
    ],
)
def test_a_folder_without_the_tasks_files_is_told_the_layout(
    tmp_path: Path, folder: Path, task: str, layout: str
) -> None:
    name = LAYOUTS[task][0]
    said = refused(tmp_path, task)
    assert said.startswith(f"task.data_dir: there is no {tmp_path / name / 'train.tsv'}.")
    assert layout in said
    assert layout in refused(folder / name, task)  # the task's own folder, not the one above


def test_a_folder_without_the_mismatched_rows_is_not_whole(folder: Path) -> None:
    (folder / "MNLI" / "dev_mismatched.tsv").unlink()
    assert f"there is no {folder / 'MNLI' / 'dev_mismatched.tsv'}." in refused(folder, "mnli")


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("sst2", "index\tsentence\n0\tgood\n", "train.tsv has no column 'label'. Columns: index,"),
        ("sst2", "", "train.tsv has no column 'sentence'. Columns: none."),
        ("sst2", "sentence\tlabel\na\t0\nb\n", "train.tsv line 3 has fewer cells than columns."),
        ("cola", "gj04\t1\t\ta\ngj04\t0\t*\n", "train.tsv line 2 has fewer cells than columns."),
        ("sst2", "sentence\tlabel\na\t0\nb\t2\n", "train: train.tsv line 3: label '2' is not one"),
        ("sst2", "sentence\tlabel\na\t0\nb\t-1\n", "train.tsv line 3: label '-1' is not one of"),
        ("sst2", "sentence\tlabel\na\t0\nb\tgood\n", "line 3: label 'good' is not one of"),
        ("sst2", "sentence\tlabel\na\t1\nb\t1\n", "have the label 'positive'; a classifier needs"),
        ("sst2", "sentence\tlabel\n", "train.tsv holds no rows."),
        ("stsb", "sentence1\tsentence2\tscore\n", "train.tsv holds no rows."),
        ("sst2", b"sentence\tlabel\n\xff\t0\n", "line 2: byte 15 is not UTF-8 text"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\thigh\n", "line 2: label 'high': expected a"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: label 'nan': expected a"),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t3\nc\td\t3.0\n", "2 rows of "),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    folder: Path, task: str, text: str | bytes, message: str
) -> None:
    rewrite(folder, task, text)
    said = refused(folder, task)
    assert said.startswith("task.data_dir: ")
    assert message in said


def test_lines_of_qqp_that_are_parts_of_a_row_are_left_out_and_counted(folder: Path) -> None:
    """A line break within a question tears its row in two, in one edition of the files."""
    header = LAYOUTS["qqp"][1]
    torn = '3\t1\t2\tWhat is "this\n"\tand what is that?\t0\n'
    rewrite(folder, "qqp", f"{header}\n1\t1\t2\ta\tb\t0\n{torn}2\t3\t4\tc\td\t1\n")
    splits = read(folder, "qqp")
    assert list(splits.rows["train"].texts) == [("a", "b"), ("c", "d")]
    assert list(splits.rows["train"].places) == ["train.tsv line 2", "train.tsv line 5"]
    assert splits.notes[0] == (
        "train.tsv: lines left out that are parts of a torn row: 2, the first of them line 3"
    )


# without labels


@pytest.mark.parametrize("task", LAYOUTS)
def test_test_rows_are_read_where_they_are_and_have_no_labels(folder: Path, task: str) -> None:
    assert not any(split.startswith("test") for split in read(folder, task).rows)
    add_tests(folder, task)
    splits = read(folder, task)
    for file, count in unlabelled_of(task).items():
        rows = splits.rows[file]
        assert list(rows.texts) == [row(task, file, i)[0] for i in range(count)]
        assert not rows.labelled
        assert f"{file.removesuffix('_matched')} has {count} rows, GLUE's has" in str(splits.notes)
    first = next(iter(unlabelled_of(task)))
    assert splits.rows["test"] is splits.rows[first]


def test_rows_without_labels_are_predicted_and_not_scored(folder: Path, tiny: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    add_tests(folder, "rte")
    task = tasks.build(TaskSection(name="glue/rte", data_dir=str(folder)), None)
    task = task.ready(AutoTokenizer.from_pretrained(tiny))
    model, cpu = AutoModelForSequenceClassification.from_pretrained(tiny), torch.device("cpu")
    assert tasks.outputs(model, task, "test", 3, cpu).shape == (4, 2)
    with pytest.raises(DataError, match=r"no labels to be scored by; .* --predictions\."):
        tasks.evaluate(model, task, "test", 3, cpu)


# the diagnostics

PREMISES = [("The cat sat.", "A cat sat.", "entailment"), ("It rained.", "It snowed.", "neutral")]


def diagnostics(folder: Path, name: str, labelled: bool) -> None:
    (folder / name).mkdir(exist_ok=True)
    if labelled:
        header = "Lexical Semantics\tPredicate-Argument Structure\tLogic\tKnowledge\tDomain"
        lines = [f"{header}\tPremise\tHypothesis\tLabel"]
        lines += [f"\tLogic;Core\t\t\tNews\t{a}\t{b}\t{y}" for a, b, y in PREMISES]
    else:
        lines = ["index\tsentence1\tsentence2", *(f"0\t{a}\t{b}" for a, b, _ in PREMISES)]
    file = "diagnostic-full.tsv" if labelled else "diagnostic.tsv"
    (folder / name / file).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", ["diagnostic", "AX", "MNLI"])
def test_the_full_file_of_the_diagnostics_has_labels_of_mnli(folder: Path, name: str) -> None:
    diagnostics(folder, name, labelled=True)
    diagnostics(folder, name, labelled=False)
    splits = read(folder, "ax")
    assert splits.labels == read(folder, "mnli").labels
    assert splits.rows["test"] is splits.rows["validation"]
    assert list(splits.rows["test"].texts) == [(a, b) for a, b, _ in PREMISES]
    assert list(splits.rows["test"].labels) == [y for *_, y in PREMISES]
    assert splits.notes[0] == "test has 2 rows, GLUE's has 1,104"


def test_the_short_file_of_the_diagnostics_has_none(folder: Path) -> None:
    said = refused(folder, "ax")
    assert "there is no" in said
    assert "DIR/diagnostic/ with diagnostic-full.tsv; columns Premise, Hypothesis, Label." in said
    diagnostics(folder, "diagnostic", labelled=False)
    splits = read(folder, "ax")
    assert list(splits.rows) == ["test"]
    assert not splits.rows["test"].labelled


def serve(patch: pytest.MonkeyPatch, task: str, splits: dict[str, datasets.Dataset]) -> None:
    """Puts a task of GLUE in the place of the hub, which has it and nothing else."""

    def load_dataset(path: str, config: str, revision: str | None) -> datasets.DatasetDict:
        assert (path, config, revision) == ("nyu-mll/glue", task, None)
        return datasets.DatasetDict(splits)

    patch.setattr(datasets, "load_dataset", load_dataset)


def test_the_diagnostics_on_the_hub_have_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"premise": ["a"], "hypothesis": ["b"], "label": [-1], "idx": [0]}
    serve(monkeypatch, "ax", {"test": datasets.Dataset.from_dict(given)})
    (rows,) = glue.read("glue/ax", None).rows.values()
    assert (list(rows.texts), rows.labelled) == ([("a", "b")], False)


def test_the_diagnostics_are_scored_by_matthews_correlation_and_not_trained_on(
    lorakit: Lorakit, written: Callable[[str], None], folder: Path
) -> None:
    diagnostics(folder, "MNLI", labelled=True)
    written("mnli")
    answer = lorakit("train", "recipe.yaml", "task.name=glue/ax")
    assert answer.code == 2
    assert "glue/ax is only for scoring; train glue/mnli, then eval --task glue/ax" in answer.err
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    found = json.loads(lorakit("eval", "--task", "glue/ax", "--data-dir", folder, "--json").out)
    assert (found["rows"], list(found["scores"])) == (2, ["matthews", "accuracy", "loss"])


# MRPC as Microsoft gives it


def whole(folder: Path) -> None:
    """Puts train and dev of MRPC into one file, as the corpus comes, beside the list of dev's."""
    mrpc = folder / "MRPC"
    header, *train = (mrpc / "train.tsv").read_text().splitlines()
    dev = (mrpc / "dev.tsv").read_text().splitlines()[1:]
    dev = [line.replace("\t7", "\t9", 1) for line in dev]  # ids of its own
    for name in ("train", "dev"):
        (mrpc / f"{name}.tsv").unlink()
    lines = [header, *train[:5], *dev, *train[5:]]
    (mrpc / "msr_paraphrase_train.txt").write_text("\ufeff" + "\r\n".join(lines) + "\r\n")
    listed = ["\t".join(line.split("\t")[1:3]) for line in dev]
    (mrpc / "dev_ids.tsv").write_text("\n".join(listed) + "\n")


def test_mrpc_in_one_file_is_divided_by_the_listed_ids(folder: Path) -> None:
    before = read(folder, "mrpc").rows
    whole(folder)
    after = read(folder, "mrpc").rows
    for split in ("train", "validation"):
        assert list(after[split].texts) == list(before[split].texts)
        assert list(after[split].labels) == list(before[split].labels)
    assert after["validation"].places[0] == "msr_paraphrase_train.txt line 7"


def test_mrpc_in_one_file_without_the_list_is_refused(folder: Path) -> None:
    whole(folder)
    (folder / "MRPC" / "dev_ids.tsv").unlink()
    said = refused(folder, "mrpc")
    assert said.startswith(f"task.data_dir: there is no {folder / 'MRPC' / 'dev_ids.tsv'}, which")


# the hub

HUB_COLUMNS = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
}
HUB_SPLITS = {
    "train": "train",
    "dev": "validation",
    "dev_matched": "validation_matched",
    "dev_mismatched": "validation_mismatched",
    "test": "test",
    "test_matched": "test_matched",
    "test_mismatched": "test_mismatched",
}


def on_the_hub(task: str) -> dict[str, datasets.Dataset]:
    """The rows of `laid_out` as the hub has them: numbered labels, names of columns of its own."""
    names = list(LAYOUTS[task][3])
    files = {**files_of(task), **unlabelled_of(task)}
    feature: Any = datasets.Value("float32") if task == "stsb" else datasets.ClassLabel(names=names)
    columns = HUB_COLUMNS.get(task, ("sentence1", "sentence2"))
    features = {**dict.fromkeys(columns, datasets.Value("string")), "label": feature}
    found = {}
    for file, count in files.items():
        rows = [row(task, file, i) for i in range(count)]
        table: dict[str, list[Any]] = {
            column: [texts[at] for texts, _ in rows] for at, column in enumerate(columns)
        }
        table["label"] = [float(y) if task == "stsb" else names.index(y) for _, y in rows]
        if file in unlabelled_of(task):
            table["label"] = [-1] * count
        found[HUB_SPLITS[file]] = datasets.Dataset.from_dict(table, datasets.Features(features))
    return found


@pytest.mark.parametrize("task", LAYOUTS)
def test_the_hub_and_the_folder_hold_the_same_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    serve(monkeypatch, task, on_the_hub(task))
    add_tests(folder, task)
    theirs, ours = glue.read(f"glue/{task}", None), read(folder, task)
    assert (theirs.labels, theirs.notes) == (ours.labels, ours.notes)
    for split, rows in ours.rows.items():
        assert list(theirs.rows[split].texts) == list(rows.texts)
        if task == "stsb":
            assert list(map(float, theirs.rows[split].labels)) == list(map(float, rows.labels))
        else:
            assert list(theirs.rows[split].labels) == list(rows.labels)


@pytest.mark.parametrize("task", LAYOUTS)
def test_without_the_hub_the_way_out_is_named(task: str) -> None:
    with pytest.raises(DataError) as refusal:
        glue.read(f"glue/{task}", None)
    said = str(refusal.value)
    assert f"null means the hub: 'hub:nyu-mll/glue/{task}' cannot be loaded: " in said
    assert said.endswith("give a folder in GLUE's official layout: task.data_dir=DIR.")


# how many rows


def test_another_number_of_rows_than_glues_is_said(folder: Path) -> None:
    assert read(folder, "sst2").notes == (
        "train has 12 rows, GLUE's has 67,349",
        "validation has 6 rows, GLUE's has 872",
    )
    assert read(folder, "mnli").notes[1:] == (
        "validation has 6 rows, GLUE's has 9,815",
        "validation_mismatched has 3 rows, GLUE's has 9,832",
    )


def test_another_number_of_rows_is_a_warning_even_where_all_else_is_silent(
    lorakit: Lorakit, written: Callable[[str], None]
) -> None:
    written("mnli")
    for silent in ((), ("--json",)):
        answer = lorakit("train", "recipe.yaml", "train.steps=1", "--dry-run", *silent)
        assert "WARNING: validation has 6 rows, GLUE's has 9,815" in answer.err
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    both = ("--json", "--split", "validation,validation_mismatched")
    for asked, named in ((("--json",), ""), (both, "glue/mnli: ")):
        answer = lorakit("eval", *asked)
        assert f"WARNING: {named}validation has 6 rows, GLUE's has 9,815" in answer.err


def test_as_many_rows_as_glue_has_are_not_worth_a_note(folder: Path) -> None:
    for name, count in (("train", 635), ("dev", 71)):
        lines = [f"{i}\ta\tb\t{i % 2}" for i in range(count)]
        rewrite(folder, "wnli", "\n".join([LAYOUTS["wnli"][1], *lines]), name)
    assert read(folder, "wnli").notes == ()


def test_either_edition_of_qqp_has_the_right_number_of_rows(folder: Path) -> None:
    for count, noted in ((40_430, False), (40_432, False), (40_431, True)):
        lines = [f"{i}\t1\t2\ta\tb\t{i % 2}" for i in range(count)]
        rewrite(folder, "qqp", "\n".join([LAYOUTS["qqp"][1], *lines]), "dev")
        notes = [note for note in read(folder, "qqp").notes if note.startswith("validation")]
        assert notes == ["validation has 40,431 rows, GLUE's has 40,430 or 40,432"] * noted


# metrics


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("cola", ("matthews",)),
        ("sst2", ("accuracy",)),
        ("mrpc", ("accuracy", "f1")),
        ("qqp", ("accuracy", "f1")),
        ("stsb", ("pearson", "spearman")),
        ("mnli", ("accuracy",)),
        ("qnli", ("accuracy",)),
        ("rte", ("accuracy",)),
        ("wnli", ("accuracy",)),
    ],
)
def test_each_task_is_scored_by_its_official_metrics(
    folder: Path, task: str, metrics: tuple[str, ...]
) -> None:
    built = tasks.build(TaskSection(name=f"glue/{task}", data_dir=str(folder)), None)
    assert built.metric_names() == (*metrics, "loss")
    outputs = len(built.head().labels)
    assert outputs == (1 if task == "stsb" else len(LAYOUTS[task][3]))
    labels = torch.tensor([0.5, 4.0, 2.0]) if task == "stsb" else torch.tensor([0, 1, 1])
    perfect = labels[:, None] if task == "stsb" else 9 * torch.eye(outputs)[labels]
    scores = built.score(perfect, labels)
    assert tuple(scores) == built.metric_names()
    assert {name: scores[name] for name in metrics} == pytest.approx(dict.fromkeys(metrics, 100.0))


def test_accuracy_is_the_share_guessed_right_and_the_loss_a_mean(folder: Path) -> None:
    task = tasks.build(TaskSection(name="glue/sst2", data_dir=str(folder)), None)
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    scores = task.score(outputs, torch.tensor([0, 1, 0, 1]))
    assert scores["accuracy"] == 75.0
    assert scores["loss"] == pytest.approx(math.log1p(math.exp(-2)) + 2 / 4)  # one is 2 further off


def test_f1_is_of_the_second_label_alone() -> None:
    truth, guesses = [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]
    assert f1(truth, guesses) == pytest.approx(100 * 2 / 3)  # precision 2/3, recall 2/3
    assert f1([1 - y for y in truth], [1 - y for y in guesses]) == pytest.approx(50)
    assert f1([0, 0], [0, 0]) == 0


def test_matthews_correlation_is_that_of_the_four_counts() -> None:
    truth, guesses = [1] * 6 + [0] * 4, [1] * 5 + [0] + [1] + [0] * 3  # tp 5, fn 1, fp 1, tn 3
    assert matthews(truth, guesses) == pytest.approx(100 * (5 * 3 - 1 * 1) / (6 * 4))
    assert matthews(truth, [1 - y for y in truth]) == pytest.approx(-100)
    assert matthews(truth, [1] * 10) == matthews([1], [1]) == 0


def test_pearson_sees_lines_and_spearman_orders() -> None:
    x = [0.0, 1.0, 2.5, 4.0]
    assert pearson(x, [3 * value - 2 for value in x]) == pytest.approx(100)
    assert pearson(x, [-value for value in x]) == pytest.approx(-100)
    cubes = [value**3 for value in x]
    assert spearman(x, cubes) == pytest.approx(100)
    assert pearson(x, cubes) < 99
    assert spearman([1.0, 2.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(
        100 * 4.5 / math.sqrt(4.5 * 5)  # ranks 1, 2.5, 2.5, 4
    )


def test_what_is_constant_correlates_with_nothing() -> None:
    for metric in (pearson, spearman):
        assert metric([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]) == 0
        assert metric([4.0, 4.0], [1.0, 2.0]) == 0
        assert metric([1.0], [2.0]) == 0


# regression


def test_the_loss_of_stsb_is_the_squared_error_summed_over_rows(folder: Path) -> None:
    task = tasks.build(TaskSection(name="glue/stsb", data_dir=str(folder)), None)
    outputs, labels = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0.0, 2.5, 2.0])
    assert task.score(outputs, labels)["loss"] == pytest.approx((1 + 0.25 + 9) / 3)


def test_a_head_of_one_output_is_a_regression() -> None:
    assert Head(("score",)).problem == "regression"
    assert Head(("bad", "good")).problem == "single_label_classification"


# from the first step to the last


@pytest.fixture
def written(recipe: Path, folder: Path) -> Callable[[str], None]:
    """Writes a recipe of a few lively steps for a task."""

    def write(task: str) -> None:
        given = yaml.safe_load(recipe.read_text())
        del given["data"]
        given["task"] = {"name": f"glue/{task}", "data_dir": str(folder), "max_length": 24}
        given["adapter"] |= {"rank": 4, "alpha": 32}
        given["train"] |= {"steps": 8, "lr": 0.05, "save_every": None}
        recipe.write_text(yaml.safe_dump(given))

    return write


@pytest.mark.parametrize(
    ("task", "metrics", "labels", "problem"),
    [
        ("stsb", {"pearson", "spearman", "loss"}, ["score"], "regression"),
        (
            "mrpc",
            {"accuracy", "f1", "loss"},
            ["not_equivalent", "equivalent"],
            "single_label_classification",
        ),
    ],
)
def test_a_pair_task_trains_prunes_loads_in_peft_and_scores_again(
    lorakit: Lorakit,
    written: Callable[[str], None],
    task: str,
    metrics: set[str],
    labels: list[str],
    problem: str,
) -> None:
    written(task)
    dry = lorakit("train", "recipe.yaml", "--dry-run", "--json")
    assert json.loads(dry.out)["labels"] == labels
    answer = lorakit("train", "recipe.yaml")
    assert answer.code == 0, answer.err
    run = Path("runs/tiny")
    scored = json.loads(lorakit("eval", run, "--json").out)
    assert set(scored["scores"]) == metrics
    ours = open_trained(run)
    assert ours.model.config.problem_type == problem  # type: ignore[union-attr]

    answer = lorakit("prune", run)
    assert answer.code == 0, answer.err
    pruned = run / "pruned"
    assert ", ".join(labels) in (pruned / "README.md").read_text()
    again = json.loads(lorakit("eval", pruned, "--json").out)
    assert again["scores"] == pytest.approx(scored["scores"], abs=1e-4)

    auto = peft.AutoPeftModelForSequenceClassification
    theirs = auto.from_pretrained(pruned, num_labels=len(labels)).eval()
    rows = models.probe(ours.model)
    assert logits(theirs, rows).shape == (4, len(labels))
    assert_close(logits(theirs, rows), logits(ours.model, rows), rtol=0, atol=1e-5)

    for ours_alone in ("lorakit.json", seal.NAME):  # without, another tool's: labels have no names
        (pruned / ours_alone).unlink()
    bare = lorakit("eval", pruned, "--json")
    assert json.loads(bare.out)["scores"] == pytest.approx(scored["scores"], abs=1e-4)


def test_a_regression_learns_the_size_of_its_scores(
    lorakit: Lorakit, written: Callable[[str], None]
) -> None:
    written("stsb")
    assert lorakit("train", "recipe.yaml", "train.steps=30").code == 0
    found = json.loads(lorakit("eval", "runs/tiny", "--json", "--split", "train").out)
    assert found["scores"]["loss"] < (0.5**2 + 4.75**2) / 2 / 2  # half of what answering 0 costs


def test_a_head_of_scores_cannot_be_scored_on_labels(
    lorakit: Lorakit, written: Callable[[str], None], folder: Path
) -> None:
    written("stsb")
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    answer = lorakit("eval", "runs/tiny", "--task", "glue/rte", "--data-dir", folder)
    assert answer.code == 2
    assert "was trained for 1 label (score); glue/rte has 2 (entailment, not_en" in answer.err


def test_mnli_is_scored_on_matched_and_on_mismatched_rows(
    lorakit: Lorakit, written: Callable[[str], None]
) -> None:
    written("mnli")
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    assert json.loads(lorakit("eval", "--json").out)["rows"] == 6
    other = json.loads(lorakit("eval", "--json", "--split", "validation_mismatched").out)
    assert (other["rows"], other["split"]) == (3, "validation_mismatched")


def test_several_tasks_and_splits_are_scored_in_one_table_as_each_is_alone(
    lorakit: Lorakit, written: Callable[[str], None], folder: Path, tmp_path: Path
) -> None:
    diagnostics(folder, "MNLI", labelled=True)
    written("mnli")
    assert lorakit("train", "recipe.yaml", "train.steps=2").code == 0
    for options, expected in (
        (("--task", "glue/mnli,glue/ax"), [("glue/mnli", "validation"), ("glue/ax", "validation")]),
        (
            ("--split", "validation, validation_mismatched"),
            [("glue/mnli", "validation"), ("glue/mnli", "validation_mismatched")],
        ),
    ):
        answer = lorakit("eval", *options, "--json", "--output-path", tmp_path / "scores.json")
        assert answer.code == 0, answer.err
        found = json.loads(answer.out)["results"]
        assert json.loads((tmp_path / "scores.json").read_text())["results"] == found
        assert [(one["task"], one["split"]) for one in found] == expected
        for one in found:
            alone = ("eval", "--json", "--task", one["task"], "--split", one["split"])
            same = json.loads(lorakit(*alone).out)
            assert {**one, "notes": []} == {**same, "notes": []}
            assert one["notes"][0] == f"{one['task']}: {same['notes'][0]}"
    shown = lorakit("eval", "--task", "glue/mnli,glue/ax").out.splitlines()
    assert shown[1].split() == ["task", "split", "rows", "scores"]
    assert [line.split()[:3] for line in shown[3:]] == [
        ["glue/mnli", "validation", "6"],
        ["glue/ax", "validation", "2"],
    ]


def test_tasks_that_the_head_does_not_fit_are_refused_together(
    lorakit: Lorakit, written: Callable[[str], None]
) -> None:
    written("mnli")
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    answer = lorakit("eval", "--task", "glue/mnli,glue/rte,glue/stsb,glue/ax")
    assert (answer.code, answer.out) == (2, "")
    faults = answer.err.partition("nothing was scored: ")[2].splitlines()
    assert faults[0] == "3 faults"
    assert "glue/rte validation: " in faults[1]
    assert "glue/rte has 2 (entailment, not_entailment)" in faults[1]
    assert "glue/stsb has 1 (score)" in faults[2]
    assert "glue/ax validation: task.data_dir: there is no " in faults[3]
    answer = lorakit("eval", "--split", "validation,validation_mismatch")
    assert "glue/mnli" not in answer.out
    assert "no split 'validation_mismatch'. Nearest: 'validation_mismatched'." in answer.err


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("glue/sst,glue/mnli", "--task: 'glue/sst': expected "),
        ("glue/mnli,hellaswag", "glue/mnli of lorakit's own tasks and hellaswag of lm-eval"),
        ("classification,piqa,boolq", "classification of lorakit's own tasks and piqa, boolq of"),
    ],
)
def test_lists_that_are_no_list_of_one_kind_are_refused(
    lorakit: Lorakit, recipe: Path, task: str, message: str
) -> None:
    answer = lorakit("eval", "nowhere", "--task", task)
    assert answer.code == 2
    assert message in answer.err


def test_several_files_of_predictions_are_written_at_once(
    lorakit: Lorakit, written: Callable[[str], None], folder: Path
) -> None:
    add_tests(folder, "mnli")
    diagnostics(folder, "MNLI", labelled=False)
    written("mnli")
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    both = ("--split", "test_matched,test_mismatched", "--predictions", "out")
    answer = lorakit("eval", *both)
    assert answer.code == 0, answer.err
    assert answer.out == "written: out/MNLI-m.tsv, 4 rows\nwritten: out/MNLI-mm.tsv, 2 rows\n"
    files = json.loads(
        lorakit(
            "eval",
            "--task",
            "glue/mnli,glue/ax",
            *("--split", "test"),
            "--predictions",
            "out",
            "--json",
        ).out
    )["results"]
    assert [one["file"] for one in files] == ["out/MNLI-m.tsv", "out/AX.tsv"]


# the real files


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real GLUE files, which are not shipped")
@pytest.mark.parametrize(
    ("task", "sizes"), [("sst2", (67_349, 872, 1_821)), ("mrpc", (3_668, 408, 1_725))]
)
def test_the_real_files_have_the_official_number_of_rows(
    task: str, sizes: tuple[int, int, int]
) -> None:
    splits = read(REAL, task)
    assert tuple(len(rows.texts) for rows in splits.rows.values()) == sizes
    assert not splits.rows["test"].labelled
    assert splits.notes == ()
    assert set(splits.rows["validation"].labels) == set(splits.labels)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="needs samples of GLUE, which are not shipped")
@pytest.mark.parametrize("task", ["cola", "rte", "stsb", "wnli"])
def test_samples_of_the_real_files_are_read_to_the_last_row(task: str) -> None:
    splits, (name, header, *_) = read(SAMPLES, task), LAYOUTS[task]
    for split, file in (("train", "train"), ("validation", "dev")):
        lines = (SAMPLES / name / f"{file}.tsv").read_text().splitlines()
        assert len(splits.rows[split].texts) == len(lines) - bool(header)
        assert (lines[0] == header) == bool(header)
    texts = splits.rows["validation"].texts[0]
    assert all(text in lines[1 if header else 0] for text in texts)

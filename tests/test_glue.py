"""GLUE's files as they are: unquoted, numbered labels, a folder for each task."""

from pathlib import Path

import pytest
from conftest import SHARED

from lorakit import tasks
from lorakit.errors import DataError
from lorakit.tasks import TaskSection, glue

REAL = SHARED / "glue"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small SST-2 in the official layout."""
    rows = [f"{word} film number {i}\t{label}" for i in range(6) for word, label in WORDS]
    (tmp_path / "SST-2").mkdir()
    for name, part in (("train", rows[:8]), ("dev", rows[8:])):
        text = "\n".join(["sentence\tlabel", *part]) + "\n"
        (tmp_path / "SST-2" / f"{name}.tsv").write_text(text)
    return tmp_path


WORDS = (("dull", 0), ("bright", 1))


def rewrite(folder: Path, text: str | bytes, name: str = "train") -> Path:
    path = folder / "SST-2" / f"{name}.tsv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as refusal:
        glue.read("glue/sst2", str(folder))
    return str(refusal.value)


def test_train_and_dev_are_the_training_and_the_validation_rows(folder: Path) -> None:
    splits = glue.read("glue/sst2", str(folder))
    assert {name: len(rows.texts) for name, rows in splits.rows.items()} == {
        "train": 8,
        "validation": 4,
    }
    assert splits.rows["train"].texts[:2] == [("dull film number 0",), ("bright film number 0",)]


def test_numbers_of_labels_become_names_in_their_order(folder: Path) -> None:
    splits = glue.read("glue/sst2", str(folder))
    assert splits.labels == ("negative", "positive")
    assert splits.rows["train"].labels[:2] == ["negative", "positive"]


def test_a_lone_quote_is_a_letter_and_swallows_no_rows(folder: Path) -> None:
    rewrite(folder, 'sentence\tlabel\n"dull\t0\na 6" screen\t1\n"quoted" whole\t0\nlast "\t1\n')
    rows = glue.read("glue/sst2", str(folder)).rows["train"]
    assert rows.texts == [('"dull',), ('a 6" screen',), ('"quoted" whole',), ('last "',)]


def test_line_ends_of_windows_and_empty_lines_change_nothing(folder: Path) -> None:
    before = glue.read("glue/sst2", str(folder))
    text = (folder / "SST-2" / "train.tsv").read_text()
    rewrite(folder, text.replace("\n", "\r\n") + "\r\n\n")
    after = glue.read("glue/sst2", str(folder))
    assert (after.rows["train"].texts, after.rows["train"].labels) == (
        before.rows["train"].texts,
        before.rows["train"].labels,
    )


def test_a_repeated_text_is_kept_as_everyone_scores_it(folder: Path) -> None:
    rewrite(folder, "sentence\tlabel\na\t0\na\t1\na\t0\n")
    assert len(glue.read("glue/sst2", str(folder)).rows["train"].texts) == 3


def test_a_folder_without_the_tasks_files_is_told_the_layout(tmp_path: Path) -> None:
    said = refused(tmp_path)
    assert said.startswith(f"task.data_dir: there is no {tmp_path / 'SST-2' / 'train.tsv'}.")
    assert "DIR/SST-2/train.tsv and dev.tsv, with columns sentence, label" in said


def test_the_tasks_own_folder_in_place_of_the_one_above_is_told_the_layout(folder: Path) -> None:
    assert "DIR/SST-2/train.tsv" in refused(folder / "SST-2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("index\tsentence\n0\tgood\n", "train.tsv line 2 has no 'label'; it has index, sentence."),
        ("sentence\tlabel\na\t0\nb\n", "train.tsv line 3 has no 'label'; it has sentence."),
        ("sentence\tlabel\na\t0\nb\t2\n", "train: train.tsv line 3: label '2' is not one of"),
        ("sentence\tlabel\na\t0\nb\t-1\n", "train.tsv line 3: label '-1' is not one of"),
        ("sentence\tlabel\na\t0\nb\tgood\n", "train.tsv line 3: label 'good' is not one of"),
        ("sentence\tlabel\na\t1\nb\t1\n", "have the label 'positive'; a classifier needs"),
        ("sentence\tlabel\n", "train.tsv holds no rows."),
        ("", "train.tsv holds no rows."),
        (b"sentence\tlabel\n\xff\t0\n", "train.tsv cannot be read: "),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    folder: Path, text: str | bytes, message: str
) -> None:
    rewrite(folder, text)
    said = refused(folder)
    assert said.startswith("task.data_dir: ")
    assert message in said


def test_without_the_hub_the_way_out_is_named() -> None:
    with pytest.raises(DataError) as refusal:
        glue.read("glue/sst2", None)
    said = str(refusal.value)
    assert "nyu-mll/glue (sst2), which cannot be loaded" in said
    assert said.endswith("give a folder in GLUE's official layout: task.data_dir=DIR.")


def test_sst2_is_scored_by_accuracy_in_percent(folder: Path) -> None:
    import torch

    section = TaskSection(name="glue/sst2", data_dir=str(folder))
    task = tasks.build(section, None)
    assert task.metric_names() == ("accuracy", "loss")
    outputs = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]])
    scores = task.score(outputs, torch.tensor([0, 1, 0, 1]))
    assert scores["accuracy"] == 75.0
    assert scores["loss"] == pytest.approx(0.6269, abs=1e-4)  # 3 of log(1+e^-2), 1 of 2 more


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real GLUE files, which are not shipped")
def test_the_real_sst2_has_67349_and_872_rows() -> None:
    splits = glue.read("glue/sst2", str(REAL))
    assert len(splits.rows["train"].texts) == 67_349
    assert len(splits.rows["validation"].texts) == 872
    assert set(splits.rows["validation"].labels) == {"negative", "positive"}

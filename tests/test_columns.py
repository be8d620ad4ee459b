"""Which columns are read, and what a cell may hold."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import jsonl

from lorakit import data
from lorakit.data import DataSection, Splits, labels
from lorakit.data.columns import Asked
from lorakit.data.labels import Kind, as_text, by_number, in_order
from lorakit.data.rows import Rows
from lorakit.errors import DataError


def found(*columns: str, texts: tuple[str, ...] | None = None, label: str | None = None) -> Any:
    return tuple(Asked(texts, label, labels.ONE).among(columns))


def read(train: str, kind: Kind = labels.ONE, **settings: Any) -> Splits[Rows]:
    return data.read(DataSection(train=train, **settings), kind)


def refused(train: str, kind: Kind = labels.ONE, **settings: Any) -> str:
    with pytest.raises(DataError) as refusal:
        read(train, kind, **settings)
    return str(refusal.value)


def all_labels(splits: Splits[Rows]) -> list[Any]:
    return sorted(label for rows in splits.rows.values() for label in rows.labels)


# which columns


@pytest.mark.parametrize(
    ("columns", "texts", "label"),
    [
        (("text", "label"), ("text",), "label"),
        (("id", "Review ", "Sentiment"), ("Review ",), "Sentiment"),
        (("sentence1", "sentence2", "score"), ("sentence1", "sentence2"), "score"),
        (("hypothesis", "premise", "label"), ("premise", "hypothesis"), "label"),
        (("question", "sentence", "label"), ("question", "sentence"), "label"),
        (("question", "context", "label"), ("question", "context"), "label"),
        (("text", "sentence", "label", "score"), ("text",), "label"),
    ],
)
def test_columns_are_found_by_what_they_are_mostly_called(
    columns: tuple[str, ...], texts: tuple[str, ...], label: str
) -> None:
    assert found(*columns) == (texts, label)


def test_named_columns_need_no_usual_name() -> None:
    assert found("a", "b", "c", texts=("c", "a"), label="b") == (("c", "a"), "b")


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        (("a", "label"), {}, "of the columns a, label none is called like a text (text, sentence"),
        (("text", "a"), {}, "of the columns text, a none is called like a label (label, labels, "),
        (("review", "comment", "label"), {}, "several could be the text: review, comment; name it"),
        (("sentence1", "sentence2", "text", "label"), {}, ""),
        (("text", "target", "class"), {}, "several could be the label: target, class; name it: da"),
        (("text", "label"), {"texts": ("text", "texts2")}, "no column 'texts2'. Nearest: 'text'."),
        (("text", "labels"), {"label": "lables"}, "no column 'lables'. Nearest: 'labels'. Colum"),
    ],
)
def test_none_and_several_are_refused_with_the_columns_there_are(
    columns: tuple[str, ...], asked: dict[str, Any], message: str
) -> None:
    if not message:  # a text by its very name is meant, whatever stands beside it
        assert found(*columns) == (("text",), "label")
        return
    with pytest.raises(DataError) as refusal:
        found(*columns, **asked)
    assert message in str(refusal.value)


def test_what_was_found_is_said_unless_it_goes_without_saying(tmp_path: Path) -> None:
    rows = [{"review": f"row {i}", "sentiment": "xy"[i % 2]} for i in range(8)]
    path = jsonl(tmp_path, rows)
    told = "columns found by their names: text 'review', label 'sentiment'"
    assert read(path).notes == (told,)
    assert read(path, text="review").notes == ("columns found by their names: label 'sentiment'",)
    assert read(path, text="review", label="sentiment").notes == ()


def test_validation_rows_have_the_columns_of_the_training_rows(tmp_path: Path) -> None:
    train = jsonl(tmp_path, [{"review": f"row {i}", "label": i % 2} for i in range(4)])
    other = jsonl(tmp_path, [{"text": "x", "label": 1}], "b.jsonl")
    said = refused(train, validation=other)
    assert said == f"data.validation: {other}: no column 'review'. Columns: text, label."


# cells


def test_a_number_is_a_label_and_a_whole_one_has_no_point(tmp_path: Path) -> None:
    pa.parquet.write_table(
        pa.table({"text": ["a", "b", "c", "d"], "label": [0.0, 1.0, 0.0, 1.0]}),
        tmp_path / "a.parquet",
    )
    splits = read(str(tmp_path / "a.parquet"))
    assert splits.labels == ("0", "1")
    assert all_labels(splits) == ["0", "0", "1", "1"]
    assert [as_text(cell) for cell in (2, 2.0, 2.5, " x ", True)] == ["2", "2", "2.5", "x", "True"]


def test_numbers_as_labels_stand_in_the_order_of_their_size() -> None:
    assert in_order(["10", "9", "1", "10"]) == ("1", "9", "10")
    assert in_order(["10", "9", "b"]) == ("10", "9", "b")


def test_numbers_stand_for_the_labels_that_the_recipe_lists(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}", "label": i % 2} for i in range(8)])
    splits = read(path, labels=("negative", "positive"))
    assert Counts(all_labels(splits)) == {"negative": 4, "positive": 4}
    assert by_number("2", ("a", "b")) == "2"
    assert by_number("1", ("1", "0")) == "1"  # these are names already
    assert by_number(("0", "b"), ("a", "b")) == ("a", "b")


def Counts(items: list[str]) -> dict[str, int]:  # noqa: N802
    return {item: items.count(item) for item in items}


@pytest.mark.parametrize("label", ["null", "NaN", '""', '" "'])
def test_a_row_without_a_label_is_refused_with_its_line(tmp_path: Path, label: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "a", "label": "x"}}\n{{"text": "b", "label": {label}}}\n')
    assert refused(str(path)) == "data.train: rows.jsonl line 2: no value in column 'label'."


def test_a_label_that_is_nan_in_a_parquet_file_is_refused_with_its_row(tmp_path: Path) -> None:
    values = pa.array([1.0, float("nan"), None], from_pandas=False)
    pa.parquet.write_table(
        pa.table({"text": ["a", "b", "c"], "label": values}), tmp_path / "a.parquet"
    )
    for kind in (labels.ONE, labels.NUMBER):
        said = refused(str(tmp_path / "a.parquet"), kind)
        assert said == "data.train: a.parquet row 2: no value in column 'label'."


def test_a_text_file_alone_has_nothing_to_learn_for_a_classifier(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert "of the columns text none is called like a label" in refused(str(tmp_path / "a.txt"))


# numbers


def test_a_regression_is_split_without_regard_to_its_numbers(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}", "score": i / 7} for i in range(20)])
    splits = read(path, labels.NUMBER, held_out=0.25)
    assert {name: len(rows.texts) for name, rows in splits.rows.items()} == {
        "train": 15,
        "validation": 5,
    }
    assert splits.labels == ()
    assert sorted(map(float, all_labels(splits))) == [i / 7 for i in range(20)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2, "three"], "rows.jsonl line 3: label 'three': expected a finite number."),
        ([1, 2, "nan"], "rows.jsonl line 3: label 'nan': expected a finite number."),
        ([1, 2, 1e999], "rows.jsonl line 3: label 'inf': expected a finite number."),
        ([1, [2]], "rows.jsonl line 2: column 'label' holds a list; expected a single label."),
        ([2, 2.0, "2"], "all 3 rows of "),
    ],
)
def test_labels_that_no_regression_can_learn_are_refused(
    tmp_path: Path, values: list[Any], message: str
) -> None:
    rows = [{"text": f"row {i}", "label": value} for i, value in enumerate(values)]
    assert message in refused(jsonl(tmp_path, rows), labels.NUMBER)


def test_a_share_that_leaves_no_row_to_train_on_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}", "label": i} for i in range(2)])
    said = refused(path, labels.NUMBER, held_out=0.9)
    assert said.startswith("data.train: of 2 rows 0.9 cannot be held out; none would be left")


def test_training_rows_that_are_all_validation_rows_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}", "label": i} for i in range(2)])
    other = jsonl(tmp_path, [{"text": f" row  {i}", "label": i} for i in range(3)], "b.jsonl")
    said = refused(path, validation=other)
    assert said == "data.train: every text is among the validation texts; none is left."


# several labels


def test_several_labels_are_a_list_or_divided_by_the_separator(tmp_path: Path) -> None:
    lists = [
        {"text": f"row {i}", "labels": each} for i, each in enumerate([["b", "a"], [], ["a", "a"]])
    ]
    cells = [{"text": f"row {i}", "labels": each} for i, each in enumerate(["b; a", "", "a;a;"])]
    want = [(), ("a",), ("b", "a")]
    whole = read(jsonl(tmp_path, lists), labels.SEVERAL)
    divided = read(jsonl(tmp_path, cells, "b.jsonl"), labels.SEVERAL, separator=";")
    assert all_labels(whole) == all_labels(divided) == want
    assert whole.labels == divided.labels == ("a", "b")


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([["a"], ["a"]], {}, "have no two different labels among them; there is nothing to learn"),
        ([[], []], {}, "have no two different labels among them"),
        ([["a"], None], {}, "line 2: column 'label' holds no value; expected a list."),
        ([["a"], {"b": 1}], {}, "line 2: column 'label' holds no list of labels."),
        ([["a", "b"], ["c"]], {"labels": ("a", "b")}, "line 2: label 'c' is not one of a, b."),
    ],
)
def test_sets_of_labels_that_cannot_be_learnt_are_refused(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str
) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}", "label": each} for i, each in enumerate(rows)])
    assert message in refused(path, labels.SEVERAL, **settings)


# a label for each word


def test_words_and_their_tags_are_lists(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", str(i)], "ner_tags": ["O", "B-X"]} for i in range(4)]
    splits = read(jsonl(tmp_path, rows), labels.TAGS)
    assert splits.labels == ("B-X", "O")
    assert sorted(splits.rows["train"].texts)[0][0] == "a"
    assert splits.notes == ("columns found by their names: text 'tokens', label 'ner_tags'",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 2: 2 words, but 1 tags."),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' holds no list of words; give them in"),
        ({"tokens": [], "tags": []}, "line 2: 'tokens' holds no words."),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "line 2: 'tokens' holds an empty word."),
        ({"tokens": ["a", "b"], "tags": "O O"}, "column 'tags' holds no list; expected a tag for"),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, "'tags' holds a word without a tag."),
    ],
)
def test_words_without_tags_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    rows = [{"tokens": ["x"], "tags": ["B-X"]}, row]
    assert message in refused(jsonl(tmp_path, rows), labels.TAGS)

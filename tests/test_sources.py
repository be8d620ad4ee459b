"""Every kind of file, row by row; and every way in which one can be broken."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import written

from lorakit import data
from lorakit.data import DataSection, labels, tables
from lorakit.data.sources import origin, records
from lorakit.errors import DataError

LABEL = datasets.ClassLabel(names=["bad", "good"])
TEXT = datasets.Value("string")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def table(rows: int = 4, first: int = 0, **more: list[Any]) -> datasets.Dataset:
    columns = {
        "text": [f"row {i}" for i in range(first, first + rows)],
        "label": [i % 2 for i in range(rows)],
    }
    features = datasets.Features({"text": TEXT, "label": LABEL})
    return datasets.Dataset.from_dict(columns, features)


def cells(name: str, **settings: Any) -> list[dict[str, Any]]:
    return [record.cells for record in records(name, "data.train", **settings)]


def places(name: str, **settings: Any) -> list[str]:
    return [record.place for record in records(name, "data.train", **settings)]


def refused(name: str, **settings: Any) -> str:
    with pytest.raises(DataError) as refusal:
        list(records(name, "data.train", **settings))
    return str(refusal.value)


# files

ROWS = [{"text": "a, b", "label": 1}, {"text": 'say "c"', "label": 0}]


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.json", json.dumps(ROWS), "a.json item 2"),
        ("b.json", json.dumps({"version": 3, "data": ROWS}, indent=2), "b.json item 2"),
        ("c.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n", "c.jsonl line 2"),
        ("D.JSONL", "\n" + "\n".join(map(json.dumps, ROWS)), "D.JSONL line 3"),
    ],
)
def test_json_keeps_what_is_a_number(tmp_path: Path, name: str, text: str, place: str) -> None:
    path = written(tmp_path, name, text)
    assert cells(path) == ROWS
    assert places(path)[1] == place


def test_a_line_of_a_text_file_is_a_row_and_an_empty_one_is_none(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", "\ufefffirst\r\n\n  third \n")
    assert cells(path) == [{"text": "first"}, {"text": "  third "}]
    assert places(path) == ["a.txt line 1", "a.txt line 3"]


def test_a_parquet_file_of_any_tool_is_read(tmp_path: Path) -> None:
    rows = {"text": ["a", "b"], "label": [0.5, None], "tags": [["x"], []]}
    pa.parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert cells(path) == [
        {"text": "a", "label": 0.5, "tags": ["x"]},
        {"text": "b", "label": None, "tags": []},
    ]
    assert places(path) == ["a.parquet row 1", "a.parquet row 2"]


def test_numbers_of_class_labels_have_names_in_parquet_and_saved_folders(tmp_path: Path) -> None:
    found = table()
    found.to_parquet(tmp_path / "a.parquet")
    found.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert [row["label"] for row in cells(str(tmp_path / name))] == ["bad", "good"] * 2
    features = datasets.Features({"tokens": [TEXT], "tags": datasets.List(LABEL)})
    lists = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "tags": [[1, 0]]}, features)
    lists.save_to_disk(tmp_path / "lists")
    assert cells(str(tmp_path / "lists")) == [{"tokens": ["a", "b"], "tags": ["good", "bad"]}]


def test_a_class_label_of_minus_one_is_none_and_not_the_last(tmp_path: Path) -> None:
    features = datasets.Features({"text": TEXT, "label": LABEL})
    given = {"text": ["a", "b"], "label": [-1, 1]}
    datasets.Dataset.from_dict(given, features).save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert [row["label"] for row in cells(path)] == [None, "good"]
    with pytest.raises(DataError, match="saved row 1: no value in column 'label'"):
        data.read(DataSection(train=path), labels.ONE)


def test_a_saved_dictionary_gives_the_split_that_is_asked_for(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": table(4), "test": table(2, first=9)})
    splits.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert len(cells(path)) == 4
    assert cells(path, split="test")[0]["text"] == "row 9"
    assert places(path, split="test") == ["saved row 1", "saved row 2"]
    said = refused(path, split="tset")
    assert said == f"data.train: {path} has no split 'tset'. Nearest: 'test'. Here: train, test."


def test_what_has_no_splits_is_asked_for_none(tmp_path: Path) -> None:
    table().save_to_disk(tmp_path / "saved")
    said = refused(str(tmp_path / "saved"), split="test")
    assert said.endswith("saved is a single data set; it has no split 'test'.")
    path = written(tmp_path, "a.txt", "x\n")
    assert refused(path, split="test").endswith("is a single file; it has no split 'test'.")


def test_rows_come_one_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "a"}\n{broken\n')
    stream = records(path, "data.train")
    assert next(stream).cells == {"text": "a"}
    with pytest.raises(DataError, match="line 2: not JSON"):
        next(stream)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,text\nx,y\n", "has two columns of the name 'text'; rename one."),
        ("a.jsonl", '{"a": 1, "a": 2}\n', "line 1: the key 'a' stands twice in an object."),
        ("a.json", '[{"a": 1}, {"b": 1, "b": 2}]', "the key 'b' stands twice in an object."),
        ("a.json", '[{"a": 1},\n {"b": }]', "a.json line 2: not JSON: "),
        ("a.json", "3", "expected a list of objects, or one under the key 'data'."),
        ("a.json", '{"rows": []}', "expected a list of objects, or one under the key 'data'."),
        ("a.json", "[1]", "item 1: expected an object."),
        ("a.parquet", "no parquet", "a.parquet cannot be read: "),
        ("a.csv", b"text\na\nb\nc\xe9d\n", "a.csv line 4: byte 10 is not UTF-8 text; save the"),
        ("a.json", b'[{"text":\n"\xff"}]', "a.json line 2: byte 11 is not UTF-8 text; save the"),
        ("a.tsv", 'text\tlabel\n"a\tx\nb\ty\n"c\tz\n', "line 2: "),
    ],
)
def test_a_broken_file_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    said = refused(written(tmp_path, name, text))
    assert said.startswith("data.train: ")
    assert message in said


def test_a_lone_quote_that_swallows_rows_of_a_tsv_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.tsv", 'text\tlabel\nx\t0\n"dull\t0\nfine\t1\nlast"\t1\n')
    said = refused(path)
    assert "a.tsv line 3: column 'text' goes on over tabs and line breaks up to the next" in said
    whole = written(tmp_path, "b.tsv", 'text\tlabel\n"two\nlines"\t0\nx\t1\n')
    assert cells(whole)[0] == {"text": "two\nlines", "label": "0"}


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pa.parquet.write_table(twice, tmp_path / "a.parquet")
    assert refused(str(tmp_path / "a.parquet")).endswith("'text'; rename one.")


# the hub


def test_the_name_of_a_hub_set_has_two_parts_or_three() -> None:
    assert tables.hub_name("hub:stanfordnlp/imdb") == ("stanfordnlp/imdb", None)
    assert tables.hub_name("hub:nyu-mll/glue/sst2") == ("nyu-mll/glue", "sst2")
    for name in ("hub:imdb", "hub:", "hub:a/b/c/d", "hub:a//b"):
        assert "expected hub:OWNER/NAME or hub:OWNER/NAME/CONFIG." in refused(name)


def test_offline_a_hub_set_is_refused_by_name() -> None:
    said = refused("hub:owner/name")
    assert said.startswith("data.train: 'hub:owner/name' cannot be loaded: ")
    assert said.endswith("HF_HUB_OFFLINE is set: only data sets already in the cache can be used.")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub of one set, which notes what it was asked for."""
    asked: dict[str, Any] = {}
    found = datasets.DatasetDict({"train": table(20), "validation": table(6, 30)})

    def load_dataset(path: str, config: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.update(path=path, config=config, revision=revision)
        asked["times"] = asked.get("times", 0) + 1
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_set_is_read_at_its_revision(hub: dict[str, Any]) -> None:
    assert len(cells("hub:owner/name/plain", revision="v2")) == 20
    assert hub == {"path": "owner/name", "config": "plain", "revision": "v2", "times": 1}
    assert places("hub:owner/name", split="validation")[5] == "hub:owner/name row 6"


def sizes(**settings: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    splits = data.read(DataSection(**settings), labels.ONE)
    return {name: len(rows.texts) for name, rows in splits.rows.items()}, splits.notes


@pytest.mark.usefixtures("hub")
def test_a_set_that_has_validation_rows_is_scored_on_them() -> None:
    found, notes = sizes(train="hub:owner/name")
    assert found == {"train": 20, "validation": 6}
    assert notes == ("validation rows are the split 'validation' of hub:owner/name",)
    assert sizes(train="hub:owner/name", validation_split="validation")[0] == found
    assert sizes(train="hub:owner/name", train_split="validation", held_out=0.5)[0] == {
        "train": 2,
        "validation": 4,
    }


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets`' own cache, as a download of a hub's set at a commit leaves it."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, found in (("train", table(20)), ("validation", table(6, 30))):
        found.to_parquet(tmp_path / f"{split}.parquet")
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
    Parquet(
        cache_dir=str(tmp_path / "cache"),
        dataset_name="name",
        config_id="default",
        hash=COMMIT,
        data_files=files,
    ).download_and_prepare()
    (tmp_path / "cache" / "name").rename(tmp_path / "cache" / "owner___name")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.usefixtures("cached")
def test_the_commit_of_a_hub_set_is_known_from_what_was_read() -> None:
    section = DataSection(train="hub:owner/name")
    splits = data.read(section, labels.ONE)
    assert {name: len(rows.texts) for name, rows in splits.rows.items()} == {
        "train": 20,
        "validation": 6,
    }
    assert splits.origins == {"data.train": COMMIT, "data.validation": COMMIT}


def test_a_hub_is_asked_once_for_all_splits(hub: dict[str, Any]) -> None:
    splits = data.read(DataSection(train="hub:owner/name"), labels.ONE)
    assert splits.origins == {"data.train": None, "data.validation": None}, "nobody said"
    assert hub["times"] == 1


def test_files_and_folders_are_known_by_what_they_hold(tmp_path: Path) -> None:
    rows = "text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(8))
    one, same = (written(tmp_path, name, rows) for name in ("a.csv", "b.csv"))
    other = written(tmp_path, "c.csv", rows + "more,x\n")
    digest = hashlib.sha256(rows.encode()).hexdigest()
    assert origin(one, "data.train") == origin(same, "data.train") == f"sha256:{digest}"
    assert origin(other, "data.train") != origin(one, "data.train")
    splits = data.read(DataSection(train=one, validation=other, deduplicate=False), labels.ONE)
    assert splits.origins == {
        "data.train": f"sha256:{digest}",
        "data.validation": origin(other, "data.validation"),
    }
    table(4).save_to_disk(tmp_path / "saved")
    before = origin(str(tmp_path / "saved"), "data.train")
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    assert origin(str(tmp_path / "moved"), "data.train") == before
    (tmp_path / "saved" / "more").touch()
    assert origin(str(tmp_path / "saved"), "data.train") != before


def test_a_split_of_a_saved_folder_may_validate(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": table(20), "test": table(6, 30)})
    splits.save_to_disk(tmp_path / "saved")
    path = str(tmp_path / "saved")
    assert sizes(train=path)[0] == {"train": 16, "validation": 4}
    assert sizes(train=path, validation_split="test")[0] == {"train": 20, "validation": 6}
    other = written(tmp_path, "a.csv", "text,label\nnew,good\n")
    assert sizes(train=path, validation=other)[0] == {"train": 20, "validation": 1}


def test_rows_are_not_scored_on_themselves(tmp_path: Path) -> None:
    table(20).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table(20)}).save_to_disk(tmp_path / "several")
    for name, split in (("one", None), ("several", "train")):
        path = str(tmp_path / name)
        with pytest.raises(DataError, match="these are the training rows; null holds some out"):
            sizes(train=path, validation=path, validation_split=split)
    with pytest.raises(DataError, match="no split 'validation'"):
        sizes(train=str(tmp_path / "several"), validation=str(tmp_path / "several"))


def test_help_needs_neither_datasets_nor_arrow() -> None:
    import subprocess

    code = "import sys, lorakit.cli; print({'datasets', 'pyarrow', 'torch'} & {*sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"

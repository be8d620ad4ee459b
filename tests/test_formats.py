"""Records become turns: the formats, how they are found, and what is no row to learn from."""

from pathlib import Path
from typing import Any

import pytest
from conftest import jsonl

from lorakit.data import DataSection
from lorakit.data.dialogues import Dialogues, layout_of, read
from lorakit.data.formats import Turn, Wanted, fields, layout, turns
from lorakit.data.sources import Record
from lorakit.errors import DataError

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
]
SHARED = [
    {"from": "system", "value": "be brief"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "ho"},
]
SAID = (Turn("system", "be brief"), Turn("user", "hi"), Turn("assistant", "ho"))
ASKED = (Turn("user", "hi"), Turn("assistant", "ho"))


def record(**cells: Any) -> Record:
    return Record("rows.jsonl line 7", cells)


def said(row: Record, **wanted: Any) -> tuple[Turn, ...]:
    return turns(row, layout(Wanted(**wanted), row))


def refused(row: Record, **wanted: Any) -> str:
    with pytest.raises(DataError) as refusal:
        said(row, **wanted)
    return str(refusal.value)


def texts(rows: Dialogues) -> list[str]:
    return [text for row in rows.said for _, text in row]


# formats

FOUND = {
    "text": ({"id": 3, "text": "ho"}, (Turn("assistant", "ho"),)),
    "prompt": ({"prompt": "hi", "completion": "ho"}, ASKED),
    "source": ({"target": "ho", "source": "hi"}, ASKED),
    "question": ({"question": "hi", "answer": "ho"}, ASKED),
    "input": ({"input": "hi", "output": "ho"}, ASKED),
    "messages": ({"messages": MESSAGES}, SAID),
    "conversations": ({"conversations": SHARED}, SAID),
}


@pytest.mark.parametrize("name", FOUND)
def test_the_format_is_found_from_the_columns(name: str) -> None:
    cells, want = FOUND[name]
    assert said(record(**cells)) == want


def test_columns_of_any_name_can_be_named() -> None:
    row = record(asked="hi", told="ho", text="no")
    assert said(row, prompt="asked", completion="told") == ASKED
    assert said(row, prompt="told") == (Turn("assistant", "ho"),)
    assert said(record(talk=SHARED), prompt="talk") == SAID


def test_a_named_format_wins_over_the_columns() -> None:
    row = record(messages=MESSAGES, text="ho")
    assert said(row, format="text") == (Turn("assistant", "ho"),)


def test_alpacas_prompt_is_the_published_one() -> None:
    """As in train.py of github.com/tatsu-lab/stanford_alpaca."""
    with_input = said(record(instruction="Add.", input="1 and 2", output="3", text="whole"))
    without = said(record(instruction="Add.", input="", output="3"))
    assert with_input[0].text == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    assert without[0].text == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )
    assert with_input[1] == without[1] == Turn("assistant", "3")


def test_a_brace_in_an_instruction_is_a_brace() -> None:
    assert (
        "### Instruction:\nprint {x}\n" in said(record(instruction="print {x}", output="1"))[0].text
    )


def test_a_template_makes_a_prompt_of_columns() -> None:
    row = record(question="Why?", context="rain", answer="wet")
    assert said(row, template="{context}: {question} {{A}} ", completion="answer") == (
        Turn("user", "rain: Why? {A} "),
        Turn("assistant", "wet"),
    )
    assert said(row, template="{question}")[1].text == "wet"  # the completion's column is found


@pytest.mark.parametrize("template", ["no column", "{}", "{0}", "{a.b}", "{open"])
def test_a_template_without_a_column_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Single|'}'"):
        fields(template)


# what is refused

REFUSED = {
    "no format": ({"a": 1, "b": 2}, {}, "no format fits the columns a, b. Known: messages or"),
    "a named column": (
        {"question": "hi", "anwser": "ho"},
        {"prompt": "question", "completion": "answer"},
        "no column 'answer'. Nearest: 'anwser'. Columns: question, anwser.",
    ),
    "a named format": ({"text": "a"}, {"format": "alpaca"}, "no column 'instruction'."),
    "a template's column": ({"q": "a", "completion": "b"}, {"template": "{qq}"}, "no column 'qq'."),
    "no completion": ({"prompt": "a", "completion": " "}, {}, "no value in column 'completion'."),
    "no prompt": ({"prompt": None, "completion": "b"}, {}, "no value in column 'prompt'."),
    "no text": ({"text": "\n"}, {}, "no value in column 'text'."),
    "no words": ({"text": {"a": 1}}, {}, "'text' holds a dict, no text."),
    "no list": ({"messages": "hi"}, {}, "'messages': expected a list of messages, not empty."),
    "empty list": ({"messages": []}, {}, "'messages': expected a list of messages, not empty."),
    "no role": ({"messages": [{"text": "a"}]}, {}, "messages 1: expected `role` and `content`, or"),
    "unknown role": (
        {"messages": [{"role": "asistant", "content": "a"}]},
        {},
        "messages 1: no role 'asistant'. Nearest: 'assistant'. Known: system, user,",
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {},
        "messages 1: its content is a list; only text is learnt.",
    ),
    "silence": (
        {"messages": [MESSAGES[1], {"role": "assistant", "content": ""}]},
        {},
        "messages 2: the assistant says nothing",
    ),
    "no answer": ({"messages": MESSAGES[:2]}, {}, "the chat ends with the user; expected the"),
    "no question": ({"messages": MESSAGES[2:]}, {}, "the assistant alone speaks; nobody asks."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learnt_from_is_refused_with_its_place(case: str) -> None:
    cells, wanted, message = REFUSED[case]
    told = refused(record(**cells), **wanted)
    assert told.startswith("rows.jsonl line 7: ")
    assert message in told


def test_a_later_row_without_a_column_is_refused_with_its_place(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"data.train: rows.jsonl line 2: no column 'completion'"):
        read(DataSection(train=path), Wanted())


def test_no_rows_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"data.train: .*none.jsonl holds no rows"):
        read(DataSection(train=str(tmp_path / "none.jsonl")), Wanted())


# rows of a file


def test_a_share_is_held_out_and_every_row_is_in_one_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}"} for i in range(20)])
    splits = read(DataSection(train=path, held_out=0.25), Wanted())
    train, valid = (texts(splits.rows[name]) for name in ("train", "validation"))
    assert (len(train), len(valid)) == (15, 5)
    assert sorted(train + valid) == sorted(f"row {i}" for i in range(20))
    again = read(DataSection(train=path, held_out=0.25), Wanted())
    other = read(DataSection(train=path, held_out=0.25, split_seed=1), Wanted())
    assert texts(again.rows["train"]) == train != texts(other.rows["train"])


def test_of_a_single_row_none_can_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"of 1 rows 0.2 cannot be held out; none would be left"):
        read(DataSection(train=jsonl(tmp_path, [{"text": "a"}])), Wanted())


def test_rows_that_repeat_or_are_scored_are_left_out_and_counted(tmp_path: Path) -> None:
    pair = [{"prompt": "a", "completion": c} for c in ("b", "c", "b", "d")]
    train, valid = jsonl(tmp_path, pair), jsonl(tmp_path, pair[3:], "valid.jsonl")
    section = DataSection(train=train, validation=valid)
    splits = read(section, Wanted())
    assert texts(splits.rows["train"]) == ["a", "b", "a", "c"]  # another answer is another row
    assert splits.notes == (
        "rows are read as prompt: prompt, completion",
        "1 of 4 rows repeat an earlier one: left out",
        "1 training rows are validation rows too: left out",
    )
    kept = read(section.model_copy(update={"deduplicate": False}), Wanted())
    assert len(texts(kept.rows["train"])) == 8


def test_white_space_tells_texts_apart(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": "if x:\n  y"}, {"text": "if x:\n    y"}])
    assert len(texts(read(DataSection(train=path), Wanted()).rows["train"])) == 1  # of two


def test_the_format_is_known_from_the_first_row_alone(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": "a"}, {"broken": 1}])
    assert layout_of(DataSection(train=path), Wanted()).format == "text"


def test_the_training_rows_decide_how_the_validation_rows_are_read(tmp_path: Path) -> None:
    train = jsonl(tmp_path, [{"prompt": "a", "completion": "b"}])
    valid = jsonl(tmp_path, [{"text": "a", "prompt": "x", "completion": "y"}], "valid.jsonl")
    splits = read(DataSection(train=train, validation=valid), Wanted())
    assert texts(splits.rows["validation"]) == ["x", "y"]

"""`lorakit predict`: what a model answers to texts, wherever they come from."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import Answer, jsonl, told
from foreign import causal, decoder
from test_export import trained
from torch.testing import assert_close

from lorakit import predict
from lorakit.cli import main
from lorakit.inputs import Input
from lorakit.predict import Counts, Settings
from lorakit.trained import logits, open_trained

Lorakit = Callable[..., Answer]
TEXTS = ["a warm and funny film", "dull and empty", "so so " * 40, "bleak"]


def made(folder: Path, model: Path, task: str, rows: list[dict[str, Any]], **data: Any) -> Path:
    """A run of some steps on `rows`."""
    settings = {
        "model": {"name": str(model), "precision": "fp32"},
        "task": {"name": task, "max_length": 24},
        "data": {"train": jsonl(folder, rows), "held_out": 0.25, **data},
        "adapter": {"variant": "lora", "rank": 4, "alpha": 4},
        "train": {"steps": 4, "batch_size": 8, "lr": 0.01},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    main_or_fail("train", folder / "recipe.yaml")
    return folder / "run"


def main_or_fail(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: Path, reviews: Path) -> Path:
    """A classifier of reviews, and what `prune` makes of it."""
    with reviews.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = made(tmp_path_factory.mktemp("predict"), tiny, "classification", rows, text="text")
    main_or_fail("prune", found)
    return found


def predicted(lorakit: Lorakit, *arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = told(lorakit, "predict", *arguments)["predictions"]
    return found


def refused(lorakit: Lorakit, *arguments: object) -> str:
    answer = lorakit("predict", *arguments)
    assert answer.code == 2, answer.out
    return answer.err


# answers


def test_a_label_has_the_probabilities_that_peft_gives_it(run: Path, lorakit: Lorakit) -> None:
    load = peft.AutoPeftModelForSequenceClassification.from_pretrained
    model = load(run / "pruned", num_labels=2).eval()
    words = transformers.AutoTokenizer.from_pretrained(run / "pruned")
    for answer in predicted(lorakit, run / "pruned", *TEXTS):
        encoded = words(answer["text"], truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            shares = model(**encoded).logits.softmax(dim=-1)[0]
        found = answer["probabilities"]
        assert list(found) == ["bad", "good"]
        assert_close(torch.tensor(list(found.values())), shares, rtol=0, atol=2e-6)
        assert answer["prediction"] == max(found, key=found.get)
        assert answer["probability"] == max(found.values())


def test_a_run_a_checkpoint_and_its_pruned_folder_answer_alike(run: Path, lorakit: Lorakit) -> None:
    paths = (run, run / "checkpoints" / "step-000004", run / "pruned")
    first, *others = (predicted(lorakit, path, *TEXTS) for path in paths)
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert one["probability"] == pytest.approx(two["probability"], abs=2e-6)


def test_answers_do_not_depend_on_the_batch_they_are_in(run: Path, lorakit: Lorakit) -> None:
    one, many = (predicted(lorakit, run, *TEXTS, "--batch-size", n) for n in (1, 3))
    for a, b in zip(one, many, strict=True):
        assert (a["text"], a["prediction"]) == (b["text"], b["prediction"])
        assert a["probability"] == pytest.approx(b["probability"], abs=2e-6)


def test_texts_are_read_no_further_ahead_than_a_window(run: Path) -> None:
    read = []

    def endless() -> Iterator[Input]:
        number = 0
        while True:
            read.append(number)
            yield Input((f"text {number}",), {"text": f"text {number}"}, f"line {number}")
            number += 1

    found = predict.answers(open_trained(run), endless(), Settings(batch_size=2), Counts())
    for number in range(3 * predict.WINDOW):
        given, _ = next(found)
        assert given.texts == (f"text {number}",)
        assert len(read) <= number + 1 + 2 * predict.WINDOW


def test_what_was_left_out_or_cut_is_counted(run: Path, lorakit: Lorakit) -> None:
    notes = told(lorakit, "predict", run, *TEXTS, "", "  ")["notes"]
    assert notes[0] == "2 of 6 inputs are empty and were left out"
    assert notes[1].startswith("1 of 4 texts are longer")
    assert told(lorakit, "predict", run, *TEXTS, "--max-length", 200)["notes"] == []
    assert "· 1 of 2 inputs are empty" in lorakit("predict", run, "a film", "").err


def test_a_file_without_a_text_is_told(run: Path, lorakit: Lorakit, tmp_path: Path) -> None:
    for name, text in (("in.csv", "text,label\n"), ("in.txt", "")):
        (tmp_path / name).write_text(text)
        answer = lorakit("predict", run, "--file", tmp_path / name)
        assert (answer.code, answer.out) == (0, "")
        assert "there was no text to answer" in answer.err


def test_a_length_that_the_model_or_the_tokenizer_has_no_room_for_is_refused(
    run: Path, lorakit: Lorakit
) -> None:
    assert "--max-length: 2: expected 3 to 512" in refused(lorakit, run, "a", "--max-length", 2)
    assert "--max-length: 513: expected 3 to" in refused(lorakit, run, "a", "--max-length", 513)
    (row,) = predicted(lorakit, run, "film " * 700, "--max-length", 512)
    assert row["prediction"] in ("bad", "good")


def test_what_a_model_that_labels_would_not_hear_is_refused(run: Path, lorakit: Lorakit) -> None:
    for option in (("--format", "chat"), ("--max-new-tokens", 4)):
        assert f"{option[0]}: goes with models that write" in refused(lorakit, run, "a", *option)


def test_a_person_sees_a_table(run: Path, lorakit: Lorakit) -> None:
    lines = lorakit("predict", run, "a warm film").out.splitlines()
    assert lines[0].split() == ["text", "prediction", "probability"]
    assert lines[2].startswith("a warm film")


# files


def test_a_table_keeps_its_columns_and_gets_the_answers_beside_them(
    run: Path, lorakit: Lorakit, tmp_path: Path
) -> None:
    rows = [{"id": str(i), "text": text} for i, text in enumerate([*TEXTS, "a bright, warm one"])]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    expected = predicted(lorakit, run, "--file", tmp_path / "in.csv")
    assert [{key: row[key] for key in ("id", "text")} for row in expected] == rows
    for name, delimiter in (("out.csv", ","), ("out.tsv", "\t")):
        facts = told(
            lorakit, "predict", run, "--file", tmp_path / "in.csv", "--out", tmp_path / name
        )
        assert (facts["rows"], facts["out"]) == (5, str(tmp_path / name))
        with (tmp_path / name).open(newline="") as file:
            found = list(csv.DictReader(file, delimiter=delimiter))
        assert [row["id"] for row in found] == ["0", "1", "2", "3", "4"]
        for row, one in zip(found, expected, strict=True):
            assert (row["text"], row["prediction"]) == (one["text"], one["prediction"])
            assert float(row["probabilities.good"]) == one["probabilities"]["good"]
    told(lorakit, "predict", run, "--file", tmp_path / "in.csv", "--out", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == expected


def test_lines_come_from_a_text_file_or_standard_input(
    run: Path, lorakit: Lorakit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfa warm film\r\n\nbleak\n")
    from_file = told(lorakit, "predict", run, "--file", tmp_path / "in.txt")
    assert [row["text"] for row in from_file["predictions"]] == ["a warm film", "bleak"]
    assert from_file["notes"] == ["1 of 3 inputs are empty and were left out"]
    (tmp_path / "tab.txt").write_text("a warm\tfilm\n")
    (row,) = predicted(lorakit, run, "--file", tmp_path / "tab.txt")
    assert row["text"] == "a warm\tfilm", "this model knows no pairs"
    for arguments in (("-",), ("--file", "-")):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a warm film\n\nbleak\n")))
        assert told(lorakit, "predict", run, *arguments) == from_file


def test_a_file_is_whole_or_not_there(run: Path, lorakit: Lorakit, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n' * 3 + '{"text": \n')
    message = refused(lorakit, run, "--file", tmp_path / "in.jsonl", "--out", tmp_path / "o.csv")
    assert "in.jsonl line 4: not JSON" in message
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    (tmp_path / "o.csv").write_text("mine")
    assert "exists; nothing is overwritten" in refused(
        lorakit, run, "a", "--out", tmp_path / "o.csv"
    )
    assert (tmp_path / "o.csv").read_text() == "mine"


def test_what_cannot_be_read_or_written_is_told(
    run: Path, lorakit: Lorakit, tmp_path: Path
) -> None:
    (tmp_path / "in.csv").write_text("txt,prediction\na,b\n")
    (tmp_path / "bad.txt").write_bytes(b"fine\n\xff\xfe\n")
    given = {
        (): "expected one of these: texts, --file",
        ("a", "--file", tmp_path / "in.csv"): "expected one of these",
        ("--file", tmp_path / "in.csv"): "no column 'text'. Nearest: 'txt'. Columns: txt, ",
        ("--file", tmp_path / "in.csv", "--column", "tx"): "no column 'tx'. Nearest: 'txt'",
        ("--file", tmp_path / "in.csv", "--column", "txt"): "a column 'prediction' already",
        ("--file", tmp_path / "bad.txt"): "bad.txt line 2: byte 0 is not UTF-8",
        ("--file", tmp_path / "no.csv"): "there is no such file",
        ("a", "--out", "out.xml"): "expected a name that ends in .jsonl, .csv, .tsv",
        ("a", "--out", tmp_path / "no" / "out.csv"): "there is no folder",
        ("a", "--column", "text"): "--column goes with --file",
        ("a", "b", "--pair", "c"): "--pair: 1 given, texts 2",
        ("a", "--pair", "b"): "two texts, where the model was trained on one text",
    }
    for arguments, expected in given.items():
        assert expected in refused(lorakit, run, *arguments), arguments


# other tasks


@pytest.mark.parametrize("found", [True, False], ids=["found by names", "named"])
def test_a_pair_is_given_as_it_was_in_training(
    tiny: Path, lorakit: Lorakit, tmp_path: Path, found: bool
) -> None:
    one, two = ("premise", "hypothesis") if found else ("claim", "fact")
    rows = [
        {one: f"{word} {i}", two: f"{other} {i}", "label": "yes" if i % 2 else "no"}
        for i in range(10)
        for word, other in (("warm", "bright"), ("dull", "bleak"))
    ]
    named = {} if found else {"text": [one, two]}
    run = made(tmp_path, tiny, "classification", rows, **named)
    (typed,) = predicted(lorakit, run, "warm 1", "--pair", "bright 1")
    assert (typed["text1"], typed["text2"]) == ("warm 1", "bright 1")
    (tmp_path / "in.txt").write_text("warm 1\tbright 1\n")
    (tmp_path / "in.csv").write_text(f"text,{two},{one}\nother,bright 1,warm 1\n")
    for name in ("in.txt", "in.csv"):
        (row,) = predicted(lorakit, run, "--file", tmp_path / name)
        assert row["probabilities"] == typed["probabilities"]
    assert "one text, where the model was trained on two texts" in refused(lorakit, run, "warm 1")
    (tmp_path / "other.csv").write_text(f"text,{two}\nwarm 1,bright 1\n")
    message = refused(lorakit, run, "--file", tmp_path / "other.csv")
    assert f"no column {one!r}. Columns: text, {two}. Name it by --column." in message


def test_a_regression_answers_in_numbers(tiny: Path, lorakit: Lorakit, tmp_path: Path) -> None:
    rows = [{"text": f"so {'very ' * (i % 5)}warm {i}", "score": i % 5} for i in range(24)]
    found = made(tmp_path, tiny, "regression", rows)
    ours = predicted(lorakit, found, *TEXTS)
    assert all(set(row) == {"text", "prediction"} for row in ours)
    assert len({row["prediction"] for row in ours}) == len(TEXTS)
    assert all(isinstance(row["prediction"], float) for row in ours)


def test_of_several_labels_all_that_are_likely_are_answered(
    tiny: Path, lorakit: Lorakit, tmp_path: Path
) -> None:
    rows = [
        {"text": f"{'warm' if i % 2 else 'dull'} {i}", "labels": ["a", "b"][: 1 + i % 2]}
        for i in range(24)
    ]
    found = made(tmp_path, tiny, "multi-label", rows)
    for row in predicted(lorakit, found, *TEXTS):
        assert row["prediction"] == [k for k, p in row["probabilities"].items() if p > 0.5]
        assert "probability" not in row
    assert "prediction" in lorakit("predict", found, "warm").out


def test_every_word_gets_the_tag_of_its_first_token(
    tiny: Path, lorakit: Lorakit, tmp_path: Path
) -> None:
    long = ["unbelievable", "internationalization", "counterrevolutionaries", "misunderstandings"]
    tags = ("O", "B-X", "I-X")
    rows = [
        {
            "tokens": [long[i % 4], "film", str(i)],
            "tags": [tags[i % 3], tags[i % 2], tags[i % 5 % 3]],
        }
        for i in range(24)
    ]
    found = made(tmp_path, tiny, "token-classification", rows)
    (tmp_path / "in.jsonl").write_text(json.dumps({"tokens": long}))
    (row,) = predicted(lorakit, found, "--file", tmp_path / "in.jsonl")
    opened = open_trained(found)
    encoded = opened.tokenizer([long], is_split_into_words=True, return_tensors="pt")
    guesses = logits(opened.model, dict(encoded))[0].argmax(dim=-1)
    said = [opened.head.labels[guess] for guess in guesses]
    tokens: dict[int, list[str]] = {}
    for word, tag in zip(encoded.word_ids(), said, strict=True):
        tokens.setdefault(-1 if word is None else word, []).append(tag)
    assert row["prediction"] == [tokens[word][0] for word in range(4)]
    assert row["prediction"] != [tokens[word][-1] for word in range(4)], "or this tells nothing"

    typed, cut = predicted(lorakit, found, " ".join(long), "film " * 30)
    assert typed["prediction"] == row["prediction"]
    assert 0 < len(cut["prediction"]) < 24


def test_a_language_model_goes_on_as_peft_s_does(lorakit: Lorakit, tmp_path: Path) -> None:
    base = decoder(tmp_path / "base", "Llama")
    lora = causal(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"])
    model = peft.AutoPeftModelForCausalLM.from_pretrained(lora).eval()
    words = transformers.AutoTokenizer.from_pretrained(base)
    texts = ["1 2 3", "7", "50 40 30 20 10"]
    rows = told(lorakit, "predict", lora, *texts, "--max-new-tokens", 6, "--batch-size", 2)[
        "predictions"
    ]
    for text, row in zip(texts, rows, strict=True):
        ids = words(text, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=6, do_sample=False)
        answer = words.decode(written[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert (row["text"], row["prediction"]) == (text, answer)
    assert "expected text, prompt, alpaca or chat" in refused(lorakit, lora, "1", "--format", "x")
    message = refused(lorakit, lora, "1", "--max-length", 8)
    assert "--max-length: goes with models that label" in message
    (tmp_path / "in.csv").write_text("about,of\na,b\n")  # no recipe tells of columns
    message = refused(lorakit, lora, "--file", tmp_path / "in.csv")
    assert "none is called like a text (text, sentence, review, content, …); name it: --column" in (
        message
    )


def test_a_packed_folder_answers_too(recipe: Path, lorakit: Lorakit, tiny: Path) -> None:
    found = trained(recipe, lorakit, tiny, variant="blora")
    assert lorakit("prune", found, "--packed").code == 0
    ours, theirs = (predicted(lorakit, p, *TEXTS) for p in (found / "packed", found))
    assert ours == theirs

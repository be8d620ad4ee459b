"""Tasks on users' own rows, from the file to PEFT: numbers, sets of labels, a label a word."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import yaml
from conftest import Answer, jsonl
from sklearn.metrics import accuracy_score, f1_score, root_mean_squared_error
from torch.testing import assert_close
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers import BertForTokenClassification as TokenModel

from lorakit import models, tasks
from lorakit.data import DataSection, Splits
from lorakit.data.rows import Rows
from lorakit.errors import DataError
from lorakit.tasks import TaskSection
from lorakit.tasks.multilabel import MultiLabel, exact_match, macro_f1, micro_f1
from lorakit.tasks.regression import Regression, rmse
from lorakit.tasks.tokens import MASK, TokenTask, spans
from lorakit.trained import logits, open_trained

Lorakit = Callable[..., Answer]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def build(task: str, path: str, max_length: int = 16, **settings: Any) -> Any:
    section = TaskSection(name=task, max_length=max_length)
    return tasks.build(section, DataSection(train=path, **settings))


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny)


# numbers


def test_the_root_of_the_squared_error_is_in_the_unit_of_the_labels() -> None:
    truth, guesses = [1.0, 2.0, 4.0], [1.5, 2.0, 2.0]
    assert rmse(truth, guesses) == pytest.approx(root_mean_squared_error(truth, guesses))
    assert rmse(truth, guesses) == pytest.approx(math.sqrt((0.25 + 4) / 3))


def test_own_regressions_tell_their_error_and_glues_what_glue_tells(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"text": f"row {i}", "label": i} for i in range(8)])
    own = build("regression", path)
    assert own.metric_names() == ("pearson", "spearman", "rmse", "loss")
    outputs = torch.tensor([[1.0], [2.0], [5.0]])
    scores = own.score(outputs, torch.tensor([0.0, 2.5, 2.0]))
    assert scores["rmse"] ** 2 == pytest.approx(scores["loss"])
    assert "rmse" in tasks.COSTS  # the best checkpoint is the one with the least
    assert [metric.__name__ for metric in Regression().metrics] == ["pearson", "spearman"]


# several labels


def sets(rows: int = 24) -> list[dict[str, Any]]:
    named = [[name for i, name in enumerate("abc") if row >> i & 1] for row in range(rows)]
    return [{"text": f"{' '.join(each)} row {i}", "labels": each} for i, each in enumerate(named)]


def test_metrics_of_sets_are_scikit_learns() -> None:
    draw = torch.Generator().manual_seed(0)
    truth, guesses = (torch.rand(40, 5, generator=draw) < share for share in (0.3, 0.5))
    truth[:, 4] = guesses[:, 4] = False  # which no row has, and none is guessed to
    told = (truth.tolist(), guesses.tolist())
    arrays = (truth.numpy(), guesses.numpy())
    for metric, average in ((micro_f1, "micro"), (macro_f1, "macro")):
        judged = f1_score(*arrays, average=average, zero_division=0.0)
        assert metric(*told) == pytest.approx(100 * judged)
    assert exact_match(*told) == pytest.approx(100 * accuracy_score(*arrays))
    assert micro_f1(told[0], told[0]) == exact_match(told[0], told[0]) == 100


def test_the_loss_of_several_labels_is_transformers_own(tokenizer: Any) -> None:
    objective = MultiLabel(("a", "b", "c"))
    head = objective.head()
    assert (head.multiple, head.problem) == (True, "multi_label_classification")
    config = BertConfig(**SIZES, intermediate_size=16, num_labels=3, problem_type=head.problem)
    model = BertForSequenceClassification(config).eval()
    targets = objective.targets([("a", "c"), (), ("b",)])
    assert targets.tolist() == [[True, False, True], [False] * 3, [False, True, False]]
    inputs = tokenizer(["one", "two", "three"], return_tensors="pt")
    answer = model(**inputs, labels=targets.float())
    ours = objective.loss(answer.logits, targets)
    assert_close(ours, 3 * answer.loss)


def test_a_label_is_guessed_where_its_chance_is_above_one_half() -> None:
    outputs = torch.tensor([[0.1, -0.1, 0.0]])
    assert MultiLabel(("a", "b", "c")).guesses(outputs).tolist() == [[True, False, False]]


# a label for each word

WORDS = ["Mr", "Johnsonville", "lives", "in", "New", "Yorktown", "."]
TAGS = ["O", "B-PER", "O", "O", "B-LOC", "I-LOC", "O"]


def tagged(tmp_path: Path, tokenizer: Any, max_length: int = 32) -> Any:
    rows = [{"tokens": [*WORDS, str(i)], "tags": [*TAGS, "O"]} for i in range(8)]
    return build("token-classification", jsonl(tmp_path, rows), max_length).ready(tokenizer)


def test_each_words_first_piece_has_its_label_and_no_other_token(
    tmp_path: Path, tokenizer: Any
) -> None:
    task = tagged(tmp_path, tokenizer)
    labels = task.head().labels
    assert task.head().kind == "TOKEN_CLS"
    batch = next(task.batches("train", 1))
    ids, told = batch.inputs["input_ids"][0], batch.inputs["labels"][0]
    assert len(ids) > len(WORDS) + 3  # some words are of several pieces
    starts = [i for i, label in enumerate(told.tolist()) if label != MASK]
    assert [labels[told[i]] for i in starts] == [*TAGS, "O"]
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert not any(pieces[i].startswith("##") for i in starts)
    assert all(WORDS[n].lower().startswith(pieces[i]) for n, i in enumerate(starts[:-1]))
    assert (batch.labels.tolist(), task.items(batch)) == ([8], 8)


def bytes_of_pieces() -> Any:
    """A tokenizer of GPT-2's kind, to which a blank belongs to the word behind it."""
    kind = tokenizers.Tokenizer(tokenizers.models.BPE())
    kind.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<pad>"], show_progress=False)
    kind.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=kind, pad_token="<pad>")


def test_words_have_the_ids_of_running_text(tmp_path: Path, tokenizer: Any) -> None:
    for each in (tokenizer, bytes_of_pieces()):
        found = tagged(tmp_path, each).encoded("train").columns["input_ids"]
        whole = [each(" ".join([*WORDS, str(i)]))["input_ids"] for i in range(8)]
        assert all(row.tolist() in whole for row in found)


def test_words_behind_the_longest_length_are_not_asked_for_and_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    task = tagged(tmp_path, tokenizer, max_length=5)
    assert task.items(next(task.batches("train", 1))) < 8
    assert "6 of 6 training rows are longer than 5 tokens and are cut" in task.notes


def test_the_loss_of_words_is_transformers_own_summed(tmp_path: Path, tokenizer: Any) -> None:
    task = tagged(tmp_path, tokenizer)
    model = TokenModel(BertConfig(**SIZES, intermediate_size=16, num_labels=4)).eval()
    batch = next(task.batches("train", 4))
    with torch.no_grad():
        mean = model(**batch.inputs).loss
        assert_close(task.loss(model, batch), task.items(batch) * mean)
        scores = task.score(task.predict(model, batch), batch.labels)
    assert scores["loss"] == pytest.approx(float(mean), rel=1e-5)


def test_scores_of_batches_do_not_depend_on_their_size(tmp_path: Path, tokenizer: Any) -> None:
    task = tagged(tmp_path, tokenizer)
    model = TokenModel(BertConfig(**SIZES, intermediate_size=16, num_labels=4))
    one, all_ = (tasks.evaluate(model, task, "train", n, torch.device("cpu")) for n in (1, 8))
    assert one == pytest.approx(all_, rel=1e-4)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-X I-X O", {(1, 3, "X")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("B-X I-Y", {(0, 1, "X"), (1, 2, "Y")}),
        ("I-X I-X O I-Y", {(0, 2, "X"), (3, 4, "Y")}),  # a beginning that was not told
        ("B-X-1 I-X-1", {(0, 2, "X-1")}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_spans_begin_and_end_as_conll_has_it(tags: str, found: set[Any]) -> None:
    assert set(spans(tags.split())) == found


def test_f1_is_of_whole_spans_and_accuracy_of_words() -> None:
    labels = ("B-LOC", "B-PER", "I-LOC", "O")
    task = TokenTask(Splits({}, labels, ()), 8)
    numbers = {label: i for i, label in enumerate(labels)}
    truth = [[numbers[tag] for tag in TAGS], [numbers["O"]] * 7]
    guess = [row[:] for row in truth]
    guess[0][5] = numbers["O"]  # half of New Yorktown
    guess[1][0] = numbers["B-PER"]  # one too many

    class Says(torch.nn.Module):
        def forward(self, **_: Any) -> Any:
            answer = 9.0 * torch.nn.functional.one_hot(torch.tensor(guess), 4)
            return type("Answer", (), {"logits": answer})

    told = torch.tensor(truth)
    batch = tasks.Batch({"labels": told}, torch.tensor([7, 7]), [0, 1])
    scores = task.score(task.predict(Says(), batch), batch.labels)
    assert scores["f1"] == pytest.approx(100 * 2 * 1 / (3 + 2))  # one right, three told, two there
    assert scores["accuracy"] == pytest.approx(100 * 12 / 14)
    assert task.metric_names() == ("f1", "accuracy", "loss")


def test_tags_that_begin_nothing_have_no_spans_to_score() -> None:
    for labels in (("NOUN", "VERB"), ("I-X", "O"), ("B-X", "NOUN")):
        assert TokenTask(Splits({}, labels, ()), 8).metric_names() == ("accuracy", "loss")


def test_a_tokenizer_that_does_not_know_words_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="needs a fast tokenizer"):
        tagged(tmp_path, tokenizer).ready(object())


# unlabelled rows


def test_answers_stand_in_the_order_of_the_rows_and_need_no_labels(tokenizer: Any) -> None:
    texts = ["three words here", "one", "two words", "and four words now"]
    rows = Rows([(text,) for text in texts], [], [f"line {i}" for i in range(4)], "here")
    labelled = rows._replace(labels=["a", "b", "a", "b"])
    splits = Splits({"train": labelled, "test": rows}, ("a", "b"), ())
    from lorakit.tasks.classification import Classification
    from lorakit.tasks.texts import TextTask

    task = TextTask(splits, 16, Classification(("a", "b"))).ready(tokenizer)
    model = BertForSequenceClassification(BertConfig(**SIZES, intermediate_size=16)).train()
    cpu = torch.device("cpu")
    found = tasks.outputs(model, task, "test", 3, cpu)
    assert model.training
    assert_close(found, tasks.outputs(model, task, "train", 1, cpu), rtol=1e-4, atol=1e-5)
    alone = [model.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert task.limited("test", 2).rows("test") == 2
    with pytest.raises(DataError, match=r"the rows of test have no labels .* --predictions\."):
        tasks.evaluate(model.train(), task, "test", 3, cpu)
    assert model.training


# from the first step to the last


@pytest.mark.parametrize(
    ("task", "rows", "kind"),
    [
        (
            "regression",
            [{"review": f"{'so ' * (i % 5)} {i}", "score": i % 5 + i / 99} for i in range(24)],
            peft.AutoPeftModelForSequenceClassification,
        ),
        ("multi-label", sets(), peft.AutoPeftModelForSequenceClassification),
        (
            "token-classification",
            [{"tokens": [*WORDS, str(i)], "tags": [*TAGS, "O"]} for i in range(24)],
            peft.AutoPeftModelForTokenClassification,
        ),
    ],
)
def test_a_task_trains_prunes_loads_in_peft_and_scores_again(
    lorakit: Lorakit, recipe: Path, task: str, rows: list[dict[str, Any]], kind: Any
) -> None:
    given = yaml.safe_load(recipe.read_text())
    given |= {"task": {"name": task, "max_length": 24}, "data": {"train": jsonl(Path(), rows)}}
    given["train"] |= {"steps": 30, "lr": 0.03, "save_every": None}
    given["model"]["dropout"] = 0.0
    recipe.write_text(yaml.safe_dump(given))
    answer = lorakit("train", "recipe.yaml")
    assert answer.code == 0, answer.err
    first = json.loads((Path("runs/tiny") / "metrics.jsonl").read_text().splitlines()[0])
    learnt = json.loads(lorakit("eval", "runs/tiny", "--json", "--split", "train").out)
    assert 0 < learnt["scores"]["loss"] < first["loss"]
    scored = json.loads(lorakit("eval", "runs/tiny", "--json").out)
    answer = lorakit("prune", "runs/tiny")
    assert answer.code == 0, answer.err
    again = json.loads(lorakit("eval", "runs/tiny/pruned", "--json").out)
    assert again["scores"] == pytest.approx(scored["scores"], abs=1e-3)
    ours = open_trained(Path("runs/tiny"))
    theirs = kind.from_pretrained("runs/tiny/pruned", num_labels=len(ours.head.labels)).eval()
    probe = models.probe(ours.model)
    assert_close(logits(theirs, probe), logits(ours.model, probe), rtol=0, atol=1e-5)

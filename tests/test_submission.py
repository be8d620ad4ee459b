"""GLUE's submission files: their names, their words for labels, and rows in their order."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Answer
from torch import Tensor

from lorakit import submission
from lorakit.tasks import glue

Lorakit = Callable[..., Answer]
OFFICIAL: dict[tuple[str, str], tuple[str, list[str]]] = {
    ("glue/cola", "test"): ("CoLA", ["0", "1"]),
    ("glue/sst2", "test"): ("SST-2", ["0", "1"]),
    ("glue/mrpc", "test"): ("MRPC", ["0", "1"]),
    ("glue/qqp", "test"): ("QQP", ["0", "1"]),
    ("glue/wnli", "test"): ("WNLI", ["0", "1"]),
    ("glue/rte", "test"): ("RTE", ["entailment", "not_entailment"]),
    ("glue/qnli", "test"): ("QNLI", ["entailment", "not_entailment"]),
    ("glue/mnli", "test"): ("MNLI-m", ["entailment", "neutral", "contradiction"]),
    ("glue/mnli", "test_matched"): ("MNLI-m", ["entailment", "neutral", "contradiction"]),
    ("glue/mnli", "test_mismatched"): ("MNLI-mm", ["entailment", "neutral", "contradiction"]),
    ("glue/ax", "test"): ("AX", ["entailment", "neutral", "contradiction"]),
}
"""Files of gluebenchmark.com's sample submission, and their words, by the label's number."""


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def sure_of(numbers: list[int], labels: int) -> Tensor:
    """Outputs (rows, labels) that are largest at `numbers`."""
    return torch.nn.functional.one_hot(torch.tensor(numbers), labels).float()


@pytest.mark.parametrize(("task", "split"), OFFICIAL)
def test_a_file_has_glue_s_name_and_words(tmp_path: Path, task: str, split: str) -> None:
    name, words = OFFICIAL[task, split]
    numbers = [*range(len(words)), 0, 1]
    path = submission.write(tmp_path / "new", task, split, sure_of(numbers, len(words)))
    assert path == tmp_path / "new" / f"{name}.tsv"
    header, *found = rows(path)
    assert header == ["index", "prediction"]
    assert found == [[str(i), words[number]] for i, number in enumerate(numbers)]


def test_a_similarity_has_three_decimals_from_0_to_5(tmp_path: Path) -> None:
    outputs = torch.tensor([[-0.4], [2.34567], [5.2], [5.0]])
    path = submission.write(tmp_path, "glue/stsb", "test", outputs)
    assert path.name == "STS-B.tsv"
    assert [row[1] for row in rows(path)[1:]] == ["0.000", "2.346", "5.000", "5.000"]


def test_every_task_has_a_file() -> None:
    asked = {task for task, _ in OFFICIAL} | {"glue/stsb"}
    assert asked == set(glue.TASKS)


@pytest.fixture
def run(tmp_path: Path, tiny: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on an RTE of some rows, the longest of its test rows first and last."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "glue" / "RTE"
    folder.mkdir(parents=True)
    pairs = [(f"a warm film {i}", f"it is {word}") for i in range(6) for word in ("warm", "cold")]
    label = ["entailment", "not_entailment"]
    lines = [f"{i}\t{a}\t{b}\t{label[i % 2]}" for i, (a, b) in enumerate(pairs)]
    for name in ("train", "dev"):
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *lines])
        (folder / f"{name}.tsv").write_text(text + "\n")
    tests = [("so " * 9 + a if i in (0, 11) else a, b) for i, (a, b) in enumerate(pairs)]
    lines = [f"{i}\t{a}\t{b}" for i, (a, b) in enumerate(tests)]
    (folder / "test.tsv").write_text("\n".join(["index\tsentence1\tsentence2", *lines]) + "\n")
    settings: dict[str, Any] = {
        "model": {"name": str(tiny), "precision": "fp32"},
        "task": {"name": "glue/rte", "data_dir": "glue", "max_length": 24},
        "adapter": {"variant": "lora", "rank": 4, "alpha": 32},
        "train": {"steps": 6, "batch_size": 6, "lr": 0.05},
        "output_dir": "runs/rte",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    assert lorakit("train", "recipe.yaml").code == 0
    return Path("runs/rte")


def test_unlabelled_rows_are_predicted_in_their_order(run: Path, lorakit: Lorakit) -> None:
    answer = lorakit("eval", run, "--split", "test", "--predictions", "out", "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert (facts["task"], facts["split"], facts["rows"]) == ("glue/rte", "test", 12)
    assert facts["file"] == "out/RTE.tsv"
    found = rows(Path("out/RTE.tsv"))[1:]
    for row, (_, one, two) in zip(found, rows(Path("glue/RTE/test.tsv"))[1:], strict=True):
        said = json.loads(lorakit("predict", run, one, "--pair", two, "--json").out)
        assert said["predictions"][0]["prediction"] == row[1]
    assert "written: out/RTE.tsv, 12 rows" in (
        lorakit("eval", run, "--split", "test", "--predictions", "out").out
    )


def test_what_glue_has_no_file_for_is_refused(
    run: Path, recipe: Path, lorakit: Lorakit, tmp_path: Path
) -> None:
    answer = lorakit("eval", run, "--split", "test")
    assert answer.code == 2
    assert "--predictions" in answer.err
    assert lorakit("train", recipe, "output_dir=runs/own").code == 0
    answer = lorakit("eval", "runs/own", "--predictions", "out")
    assert answer.code == 2
    assert "classification is none of its tasks; `lorakit predict --file`" in answer.err
    (tmp_path / "file").touch()
    answer = lorakit("eval", run, "--split", "test", "--predictions", "file")
    assert answer.code == 2
    assert "file is no folder" in answer.err

"""lm-evaluation-harness asks a model as lorakit has opened it; offline, by tasks in a folder."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import Answer
from foreign import causal, decoder

from lorakit import harness
from lorakit.errors import LorakitError

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own, and its packages'
Lorakit = Callable[..., Answer]
QUESTIONS = [(f"{i} {i + 1}", [str(i + 2), str(i * 7 % 60)]) for i in range(12)]
TASK = """\
task: counting
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter on a tiny Llama, and beside it a task in the harness's YAML."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    lines = [{"question": q, "choices": c, "answer": 0} for q, c in QUESTIONS]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "counting.yaml").write_text(TASK.format(rows=rows))
    base = decoder(tmp_path / "base", "Llama")
    return causal(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"])


def accuracy(lora: Path) -> float:
    """The share of questions whose first choice peft's model finds the more likely."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(lora).eval()
    words = transformers.AutoTokenizer.from_pretrained(lora.parent / "base")

    def likely(question: str, choice: str) -> float:
        ids = words(f"{question} {choice}", return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model(ids).logits.log_softmax(dim=-1)
        return float(logits[0, -2, ids[0, -1]])

    right = [likely(q, first) >= likely(q, other) for q, (first, other) in QUESTIONS]
    return sum(right) / len(right)


def test_the_harness_asks_the_model_and_its_flags_are_understood(
    lora: Path, lorakit: Lorakit
) -> None:
    include = lora.parent / "tasks"
    asked = ["--tasks", "counting", "--include_path", include, "--batch_size", 4]
    file = lora.parent / "scores.json"
    answer = lorakit("eval", lora, *asked, "--output_path", file, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["scores"] == {"counting": {"acc": pytest.approx(accuracy(lora))}}
    assert found["rows"] == {"counting": 12}
    assert 0 < found["errors"]["counting"]["acc"] < 0.2
    assert json.loads(file.read_text()) == found
    shown = lorakit("eval", lora, *asked, "--limit", 5).out
    assert shown.startswith(f"{lora}, asked by lm-evaluation-harness {found['harness']}\n")
    assert any(line.split()[:3] == ["counting", "5", "acc"] for line in shown.splitlines())


def test_what_cannot_be_asked_is_told(
    lora: Path, recipe: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object) -> str:
        answer = lorakit("eval", *arguments)
        assert answer.code == 2
        return answer.err

    assert "Nearest: 'glue/sst2'" in refused(lora, "--task", "glue/sst-2")
    include = ("--include-path", lora.parent / "tasks")
    assert "goes with tasks of the harness" in refused(
        lora, "--task", "glue/rte", "--num-fewshot", 1
    )
    assert "goes with tasks of GLUE" in refused(lora, "--task", "piqa", "--predictions", "x")
    assert "no such folder" in refused(lora, "--task", "piqa", "--include-path", "nowhere")
    (lora.parent / "rows.jsonl").unlink()
    assert "cannot ask: Unable to find" in refused(lora, "--task", "counting", *include)
    assert lorakit("train", recipe, "train.steps=1").code == 0
    head = refused("runs/tiny", "--task", "counting", *include)
    assert "asks causal language models, and runs/tiny/" in head
    assert "has a head of kind SEQ_CLS" in head
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert "pip install 'lorakit[lm-eval]'" in refused(lora, "--task", "piqa")


def test_tasks_are_named_with_commas_and_by_lists(
    lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(harness.LISTS, "mine", ("counting",))
    assert harness.find("counting, mine,", lora.parent / "tasks").names == ("counting",)


def test_the_harness_has_every_task_of_a_list() -> None:
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    files = [f for kind in ("[ahop]*", "super_glue/boolq") for f in folder.glob(f"{kind}/*.yaml")]
    known = {line for file in files for line in file.read_text().splitlines()[:6]}
    assert {f"task: {task}" for tasks in harness.LISTS.values() for task in tasks} <= known


def test_a_mistyped_task_is_answered_with_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the harness's many tasks one is near; here they are the user's alone, to be quick."""

    def few(include: Path | None) -> Iterator[Any]:
        from lm_eval.tasks import TaskManager

        yield TaskManager(include_path=str(include), include_defaults=False)

    (tmp_path / "counting.yaml").write_text(TASK.format(rows="rows.jsonl"))
    monkeypatch.setattr(harness, "_managers", few)
    with pytest.raises(LorakitError) as refusal:
        harness.find("countin", tmp_path)
    assert "no task 'countin', of lorakit's or of lm-evaluation-harness's." in str(refusal.value)
    assert "Nearest: 'counting'" in str(refusal.value)

"""Causal and seq2seq models: what is a target, its loss, packed rows, and answers written anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from conftest import jsonl
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import models, tasks
from lorakit.data import DataSection
from lorakit.data.batching import Batch
from lorakit.data.packing import best_fit
from lorakit.errors import DataError, LorakitError, ModelError
from lorakit.models import ModelSection
from lorakit.models.heads import Head
from lorakit.tasks import TaskSection
from lorakit.tasks.generation import column_of, complete, exact_match, prompt_of, rouge_l
from lorakit.tasks.language import MASK
from lorakit.tasks.own import misfits

CAUSAL = {"llama": writers.llama, "gpt2": writers.gpt2}


@pytest.fixture(scope="session")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each tiny model."""
    root = tmp_path_factory.mktemp("writers")
    return {m.__name__: m(root / m.__name__) for m in (writers.llama, writers.gpt2, writers.t5)}


def loaded(home: Path, kind: str = "CAUSAL_LM") -> models.Base:
    return models.load(ModelSection(name=str(home), precision="fp32"), Head(kind=kind), 0)


def built(path: str, name: str = "causal-lm", **settings: Any) -> Any:
    section = TaskSection(name=name, **{"max_length": 64, **settings})
    return tasks.build(section, DataSection(train=path, held_out=0.2, deduplicate=False))


def ready(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, **settings: Any) -> Any:
    """The task of two equal files, so that the training rows keep their order."""
    path = jsonl(folder, rows)
    section = TaskSection(name=settings.pop("name", "causal-lm"), **{"max_length": 64, **settings})
    data = DataSection(train=path, validation=jsonl(folder, rows, "v.jsonl"), deduplicate=False)
    return tasks.build(section, data).ready(tokenizer)


def whole(task: Any, split: str = "validation") -> Batch:
    """All rows of a split in one batch, in their order."""
    rows = task.encoded(split)
    return rows.batch(range(len(rows.lengths)))


def targets(batch: Batch, row: int = 0) -> list[int]:
    labels: list[int] = batch.inputs["labels"][row].tolist()
    return [label for label in labels if label != MASK]


PAIR = [{"prompt": "what is the capital of france ", "completion": "paris"}]
TALK = [
    {
        "messages": [
            {"role": "user", "content": "name a colour"},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": "rain falls"},
        ]
    }
]


# what is a target


@pytest.mark.parametrize("pad", [True, False])
def test_the_completion_and_the_end_are_targets_also_where_the_end_pads(
    tmp_path: Path, pad: bool
) -> None:
    home = writers.llama(tmp_path / "model", pad=pad)
    tokenizer = loaded(home).tokenizer
    task = ready(tmp_path, [*PAIR, {"prompt": "a", "completion": "b"}], tokenizer)
    batch = whole(task)
    assert tokenizer.decode(targets(batch)) == "paris<|end|>"
    assert tokenizer.decode(targets(batch, 1)) == "b<|end|>"
    assert batch.labels.tolist() == [len(targets(batch, row)) for row in (0, 1)]
    short = len(task.encoded("validation").columns["input_ids"][1])
    assert batch.inputs["attention_mask"][1].tolist()[:short] == [1] * short
    assert batch.inputs["attention_mask"][1, short:].sum() == 0
    assert set(batch.inputs["labels"][1, short:].tolist()) == {MASK}


def test_of_a_text_all_is_learnt_but_its_first_token_which_nothing_stands_before(
    tmp_path: Path,
) -> None:
    text, tokenizer = "rain falls on the roof", writers.tokenizer()
    batch = whole(ready(tmp_path, [{"text": text}], tokenizer))
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert batch.inputs["input_ids"][0].tolist() == ids
    assert batch.inputs["labels"][0].tolist() == [MASK, *ids[1:]]


def test_prompts_are_learnt_too_where_the_recipe_says_so(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer()
    batch = whole(ready(tmp_path, PAIR, tokenizer, loss_on="all"))
    assert batch.inputs["labels"][0, 1:].tolist() == batch.inputs["input_ids"][0, 1:].tolist()


def test_a_text_begins_once_with_the_tokenizers_first_token(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer(bos=True, chat=f"{writers.BOS}{writers.CHAT}")
    for rows in (PAIR, TALK):
        ids = whole(ready(tmp_path, rows, tokenizer)).inputs["input_ids"][0].tolist()
        assert (ids[0], ids.count(2)) == (2, 1)
    bare = whole(ready(tmp_path, PAIR, writers.tokenizer())).inputs["input_ids"][0].tolist()
    assert bare == ids_of(PAIR, writers.tokenizer())


def ids_of(rows: list[dict[str, Any]], tokenizer: Any) -> list[int]:
    prompt, completion = tokenizer(list(rows[0].values()), add_special_tokens=False)["input_ids"]
    return [*prompt, *completion, tokenizer.eos_token_id]


def test_the_assistants_words_are_what_transformers_says_they_are(tmp_path: Path) -> None:
    """By the markers for generation in a template, which mask tokens there."""
    marked = (
        "{% for message in messages %}<{{ message['role'] }}>"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|end|>"
        "{{ '\\n' }}{% endgeneration %}{% else %}{{ message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = writers.tokenizer(chat=writers.CHAT)
    batch = whole(ready(tmp_path, TALK, tokenizer))
    judge = tokenizer.apply_chat_template(
        TALK[0]["messages"],
        chat_template=marked,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert batch.inputs["input_ids"][0].tolist() == judge["input_ids"]
    learnt = (batch.inputs["labels"][0] != MASK).int().tolist()
    assert learnt == judge["assistant_masks"]
    assert tokenizer.decode(targets(batch)) == "blue<|end|>\nrain falls<|end|>\n"


def test_an_earlier_answer_that_a_template_rewrites_is_read_and_not_learnt(tmp_path: Path) -> None:
    rewriting = writers.CHAT.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' and not loop.last %}…{% else %}"
        "{{ message['content'] }}{% endif %}",
    )
    tokenizer = writers.tokenizer(chat=rewriting)
    batch = whole(ready(tmp_path, TALK, tokenizer))
    assert tokenizer.decode(targets(batch)) == "rain falls<|end|>\n"
    assert "<assistant>…" in tokenizer.decode(batch.inputs["input_ids"][0])


def test_a_template_that_does_not_end_an_answer_gets_its_end(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer(chat=writers.CHAT.replace("<|end|>", ""))
    batch = whole(ready(tmp_path, TALK, tokenizer))
    assert tokenizer.decode(targets(batch)) == "blue\nrain falls\n<|end|>"


def test_a_chat_without_a_template_is_refused_with_what_to_do(tmp_path: Path) -> None:
    task = ready(tmp_path, TALK, writers.tokenizer())
    with pytest.raises(DataError, match=r"v.jsonl line 1: .* no chat template.* prompt, alpaca"):
        task.rows("validation")


def test_a_chat_that_the_template_refuses_is_refused_with_its_place(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer(chat="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"v.jsonl line 1: .*template refuses it: roles must alt"):
        ready(tmp_path, TALK, tokenizer).rows("validation")


# what is too long


def test_a_cut_answer_has_no_end_and_is_counted(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer()
    rows = [*PAIR, {"prompt": "a", "completion": "rain falls " * 30}]
    task = ready(tmp_path, rows, tokenizer, max_length=24)
    batch = whole(task)
    assert batch.inputs["input_ids"].shape == (2, 24)
    assert targets(batch)[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in targets(batch, 1)
    assert "1 of 2 validation rows are longer than 24 tokens and are cut" in task.notes


def test_a_prompt_that_leaves_no_target_is_left_out_and_counted(tmp_path: Path) -> None:
    rows = [*PAIR, {"prompt": "what is rain " * 30, "completion": "it falls"}]
    task = ready(tmp_path, rows, writers.tokenizer(), max_length=24)
    assert (task.rows("train"), task.rows("validation")) == (1, 1)
    assert (
        "1 of 2 training rows were left out: a prompt of 24 tokens or more leaves nothing to learn"
        in task.notes
    )
    with pytest.raises(DataError, match=r"all 2 training rows have a prompt .*, as .* line \d; "):
        ready(tmp_path, rows, writers.tokenizer(), max_length=4).rows("train")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no token for the end of a text"):
        ready(tmp_path, PAIR, tokenizer)


# the loss


def own_loss(model: Any, batch: Batch) -> Tensor:
    """transformers' own, a mean over targets; labels of other columns are not the model's."""
    taken = {k: v for k, v in batch.inputs.items() if k != "last_answer"}
    mean: Tensor = model(**taken).loss
    return mean


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_loss_is_transformers_own_summed_over_targets(
    tmp_path: Path, homes: dict[str, Path], name: str
) -> None:
    task_name, kind = ("seq2seq", "SEQ_2_SEQ_LM") if name == "t5" else ("causal-lm", "CAUSAL_LM")
    base = loaded(homes[name], kind)
    task = ready(tmp_path, [*writers.rows(6)], base.tokenizer, name=task_name, generate=4)
    batch = whole(task)
    want = own_loss(base.model, batch)
    assert_close(task.loss(base.model, batch) / task.items(batch), want, rtol=1e-5, atol=1e-6)
    scores = tasks.evaluate(base.model, task, "validation", 4, torch.device("cpu"))
    assert list(scores) == list(task.metric_names())
    assert scores["loss"] == pytest.approx(want.item(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(want.exp().item(), rel=1e-5)


def test_logits_of_targets_alone_are_computed(tmp_path: Path, homes: dict[str, Path]) -> None:
    base = loaded(homes["llama"])
    batch = whole(task := ready(tmp_path, [*writers.rows(6)], base.tokenizer))
    shapes: list[tuple[int, ...]] = []
    base.model.lm_head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    task.loss(base.model, batch)
    assert shapes == [(task.items(batch), 400)]


def test_a_model_that_cannot_choose_its_logits_has_the_same_loss(
    tmp_path: Path, homes: dict[str, Path]
) -> None:
    base = loaded(homes["llama"])
    batch = whole(task := ready(tmp_path, [*writers.rows(6)], base.tokenizer))

    class All(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
            return base.model(input_ids=input_ids, attention_mask=attention_mask)

    assert_close(task.loss(All(), batch), task.loss(base.model, batch))


def test_accumulated_batches_have_the_gradient_of_the_big_one(
    tmp_path: Path, homes: dict[str, Path]
) -> None:
    """Of targets, not of rows: completions are of unequal length."""
    task = built(jsonl(tmp_path, [*writers.rows(40)]))
    gradients = []
    for batch_size, pieces in ((8, 1), (2, 4)):
        base = loaded(homes["llama"])
        task = task.ready(base.tokenizer)
        batches = next(task.steps(batch_size, pieces, seed=0))
        items = sum(map(task.items, batches))
        for batch in batches:
            (task.loss(base.model, batch) / items).backward()
        gradients.append([p.grad for p in base.model.parameters()])
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_the_order_is_a_function_of_seed_and_step_alone(tmp_path: Path) -> None:
    path, tokenizer = jsonl(tmp_path, [*writers.rows(30)]), writers.tokenizer()
    for packing in (False, True):
        stream = built(path, packing=packing).ready(tokenizer).steps(4, 1, seed=3)
        steps = [next(stream) for _ in range(9)]
        later = built(path, packing=packing).ready(tokenizer).steps(4, 1, seed=3, start=5)
        for want, got in zip(steps[5:], later, strict=False):
            assert [batch.rows for batch in got] == [batch.rows for batch in want]
            assert_close(got[0].inputs, want[0].inputs)


# packing


def spread(task: Any, batch: Batch) -> list[Batch]:
    """The examples of a packed batch, a batch each."""
    rows = task.encoded("train")
    return [rows.batch([i]) for i in batch.rows]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CAUSAL)
def test_packed_rows_have_the_loss_and_the_gradient_of_their_examples(
    tmp_path: Path, homes: dict[str, Path], name: str, attention: str
) -> None:
    base = loaded(homes[name])
    base.model.config._attn_implementation = attention  # type: ignore[union-attr]
    task = built(jsonl(tmp_path, [*writers.rows(30)]), packing=True).ready(base.tokenizer)
    (batch,) = next(task.steps(4, 1, seed=0))
    apart = spread(task, batch)
    assert len(apart) > len(batch.labels) == 4
    assert task.items(batch) == sum(map(task.items, apart))

    loss = task.loss(base.model, batch)
    loss.backward()
    together = [p.grad.clone() for p in base.model.parameters() if p.grad is not None]
    base.model.zero_grad()
    losses = [task.loss(base.model, one) for one in apart]
    torch.stack(losses).sum().backward()
    assert_close(loss, torch.stack(losses).sum(), rtol=1e-5, atol=1e-5)
    alone = [p.grad for p in base.model.parameters() if p.grad is not None]
    assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_an_epoch_of_packed_rows_has_every_example_once(tmp_path: Path) -> None:
    task = built(jsonl(tmp_path, [*writers.rows(40)]), packing=True).ready(writers.tokenizer())
    stream = task.steps(2, 2, seed=0)
    steps = [next(stream) for _ in range(-(-task.rows_per_epoch() // 4))]
    batches = [batch for step in steps for batch in step]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(32))
    assert task.rows("train") == 32 > task.rows_per_epoch()
    assert all(batch.inputs["input_ids"].shape[1] <= 64 for batch in batches)
    assert any("32 training rows are packed into" in note for note in task.notes)


def test_what_is_scored_is_not_packed(tmp_path: Path) -> None:
    task = built(jsonl(tmp_path, [*writers.rows(40)]), packing=True).ready(writers.tokenizer())
    for split in ("train", "validation"):
        assert all("position_ids" not in batch.inputs for batch in task.batches(split, 4))
    assert replace(task).sample("train", 8).rows("train") == 8


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_puts_each_in_one_bin_that_holds_it(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 65, (200,), generator=draw).tolist()
    bins = best_fit(lengths, 64)
    assert sorted(i for one in bins for i in one) == list(range(200))
    assert max(sum(lengths[i] for i in one) for one in bins) <= 64
    assert len(bins) <= 11 / 9 * -(-sum(lengths) // 64) + 10
    assert best_fit([33] * 4, 64) == [[0], [1], [2], [3]]
    assert best_fit([40, 30, 30, 24], 64) == [[0, 3], [1, 2]]


def test_a_model_that_sees_into_other_examples_is_refused(
    tmp_path: Path, homes: dict[str, Path]
) -> None:
    base = loaded(homes["llama"])
    packed, plain = (built(jsonl(tmp_path, PAIR * 2), packing=p) for p in (True, False))
    packed.check(base.model)

    class Leaky(nn.Module):
        config = base.model.config

        def get_input_embeddings(self) -> nn.Module:
            return base.model.get_input_embeddings()  # type: ignore[operator,no-any-return]

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return base.model(input_ids=input_ids)

    plain.check(Leaky())
    with pytest.raises(ModelError, match=r"task.packing: the model sees from one example"):
        packed.check(Leaky())


def test_a_model_that_sees_what_it_is_to_predict_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=400, num_attention_heads=4, **writers.SIZES)
    with pytest.raises(ModelError, match="sees what it is to predict"):
        built(jsonl(tmp_path, PAIR * 2)).check(BertLMHeadModel(config).eval())


# written answers


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_words() -> None:
    assert rouge_l("the cat sat", "the cat sat") == 1.0
    assert rouge_l("The cat, sat!", "the  CAT sat") == 1.0
    assert rouge_l("a b c d", "a c") == pytest.approx(2 * (2 / 4) * 1 / (2 / 4 + 1))
    assert rouge_l("police killed the gunman", "the gunman police killed") == 0.5  # of Lin 2004
    assert rouge_l("a", "b") == rouge_l("", "") == rouge_l("a", "") == 0.0


def test_an_exact_match_has_the_same_letters() -> None:
    assert exact_match("Paris", " Paris\n") == 1.0
    assert exact_match("Paris", "paris") == 0.0


PROMPTS = ["rain", "what is the capital of france ", "name the number seven: ", "a"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_prompt_is_completed_as_if_it_stood_alone(homes: dict[str, Path], name: str) -> None:
    kind = "SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM"
    base = loaded(homes[name], kind)
    model, tokenizer = base.model, base.tokenizer
    want = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        written = model.generate(ids, max_new_tokens=6, do_sample=False)[0]  # type: ignore[operator]
        answer = written if name == "t5" else written[ids.shape[1] :]
        want.append(tokenizer.decode(answer, skip_special_tokens=True))
    for batch_size in (1, 3):
        assert list(complete(model, tokenizer, PROMPTS, 6, batch_size)) == want
    assert len(set(want)) > 1


def test_an_answer_stops_at_its_end_and_where_positions_do(homes: dict[str, Path]) -> None:
    base = loaded(homes["llama"])
    with torch.no_grad():
        base.model.lm_head.weight.zero_()  # so that all tokens are as likely; the first is the end
    assert list(complete(base.model, base.tokenizer, ["a b c"], 8, 1)) == [""]
    prompt = "a" * 250
    base = loaded(homes["gpt2"])
    base.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    (text,) = complete(base.model, base.tokenizer, [prompt], 50, 1)
    assert len(base.tokenizer(text).input_ids) <= 256 - len(base.tokenizer(prompt).input_ids)
    with pytest.raises(DataError, match="none is left to write at"):
        list(complete(base.model, base.tokenizer, ["a" * 300], 5, 1))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_are_written_to_the_scored_prompts(
    tmp_path: Path, homes: dict[str, Path], name: str
) -> None:
    """A model that writes the right answers has 100 %."""
    task_name, kind = ("seq2seq", "SEQ_2_SEQ_LM") if name == "t5" else ("causal-lm", "CAUSAL_LM")
    base = loaded(homes[name], kind)
    rows = [*writers.rows(6)]
    task = ready(tmp_path, rows, base.tokenizer, name=task_name, generate=9)
    batch = whole(task)
    prompts, answers = task.asked(batch.inputs)
    assert answers == [row["completion"] for row in rows]
    assert base.tokenizer.batch_decode(prompts) == [row["prompt"] for row in rows]
    with torch.no_grad():
        outputs = task.predict(base.model, batch)
    assert outputs.shape == (6, 3)
    right = torch.cat([outputs[:, :1], torch.ones(6, 2)], dim=1)
    assert task.score(right, batch.labels)["exact_match"] == 100
    assert task.score(right, batch.labels)["rouge_l"] == 100


def test_of_a_chat_the_last_answer_is_jsonl(tmp_path: Path) -> None:
    tokenizer = writers.tokenizer(chat=writers.CHAT)
    task = ready(tmp_path, TALK, tokenizer, generate=4)
    (prompt,), (answer,) = task.asked(whole(task).inputs)
    assert tokenizer.decode(prompt).endswith("<user>what is it\n<assistant>")
    assert answer == "rain falls\n"


# prompts


FORMATS: dict[str, Callable[[str], dict[str, Any]]] = {
    "prompt": lambda text: {"prompt": text, "completion": "yes"},
    "alpaca": lambda text: {"instruction": text, "input": "", "output": "yes"},
    "chat": lambda text: {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    },
}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_a_prompt_has_the_tokens_that_it_was_trained_with(
    tmp_path: Path, form: str, bos: bool
) -> None:
    tokenizer = writers.tokenizer(bos=bos, chat=writers.CHAT)
    rows = [FORMATS[form]("what is rain")]
    task = ready(tmp_path, rows, tokenizer, max_length=128, generate=1, format=form)
    ((prompt,), _) = task.asked(whole(task).inputs)
    section = TaskSection(name="causal-lm", format=form)  # type: ignore[arg-type]
    asked = prompt_of("what is rain", section, tokenizer)
    seen: list[list[int]] = []

    class Ears:
        config = loaded_config = type("", (), {"is_encoder_decoder": False})()
        generation_config = type("", (), {"eos_token_id": None})()

        def parameters(self) -> Any:
            return iter([torch.zeros(1)])

        def generate(self, input_ids: Tensor, **_: Any) -> Tensor:
            seen.extend(input_ids.tolist())
            return input_ids

    list(complete(Ears(), tokenizer, [asked], 1, 1))  # type: ignore[arg-type]
    assert seen == [prompt]


def test_a_template_takes_the_one_text_that_it_asks_for() -> None:
    def section(**settings: Any) -> TaskSection:
        return TaskSection(name="causal-lm", **settings)

    tokenizer = writers.tokenizer()
    assert prompt_of("hi", section(template="Q: {question} A:"), tokenizer) == "Q: hi A:"
    assert prompt_of("hi", section(format="text"), tokenizer) == "hi"
    with pytest.raises(LorakitError, match="asks for a, b; one text cannot"):
        prompt_of("hi", section(template="{a} {b}"), tokenizer)
    with pytest.raises(LorakitError, match="auto: name the format"):
        prompt_of("hi", section(), tokenizer)


@pytest.mark.parametrize(
    ("columns", "task", "asked"),
    [
        (("prompt", "completion"), {}, "prompt"),
        (("source", "target"), {"format": "prompt"}, "source"),
        (("text",), {}, "text"),
        (("question", "answer"), {"template": "Q: {question} A:"}, "question"),
        (("a", "b", "completion"), {"template": "{a} {b}"}, None),
        (("instruction", "output"), {}, None),
    ],
)
def test_a_file_to_answer_is_asked_in_the_column_that_the_prompts_were_in(
    tmp_path: Path, columns: tuple[str, ...], task: dict[str, Any], asked: str | None
) -> None:
    path = jsonl(tmp_path, [dict.fromkeys(columns, "x")])
    given = TaskSection(name="causal-lm", **task), DataSection(train=path)
    section, data, _ = tasks.settled(*given)
    assert data is not None
    assert section.format != "auto"
    assert column_of(section, data) == asked
    assert tasks.settled(section, data)[:2] == (section, data)
    assert not misfits(section, data), "or the run's own recipe would be refused"


# settings


def test_what_a_task_would_ignore_is_refused_all_of_it_at_once(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    answer = lorakit(
        "train",
        recipe,
        "task.packing=true",
        "task.generate=4",
        "task.loss_on=all",
        "task.format=chat",
        "task.template={text}",
        "task.data_dir=glue",
    )
    assert answer.code == 2
    for key in ("packing: true", "loss_on: 'all'"):
        assert f"task.{key}: classification would ignore it; it is for causal-lm" in answer.err
    for key in ("generate: 4", "format: 'chat'", "template: '{text}'"):
        want = f"task.{key}: classification would ignore it; it is for causal-lm and seq2seq"
        assert want in answer.err
    assert "task.data_dir: 'glue': classification would ignore it; it is for GLUE's" in answer.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "seq2seq", "packing": True}, "seq2seq would ignore it; it is for causal-lm"),
        ({"name": "causal-lm", "template": "hi"}, "expected a text with columns in braces"),
        ({"name": "causal-lm", "format": "chat", "template": "{a}"}, "a template makes prompts"),
        ({"name": "causal-lm", "format": "jsonl"}, "Input should be 'auto', 'text'"),
    ],
)
def test_a_setting_that_cannot_hold_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSection(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "seq2seq"}, "task.format: seq2seq needs prompts with completions; rows are"),
        ({"name": "causal-lm", "generate": 4}, "task.generate: rows are read as text"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    path = jsonl(tmp_path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=message):
        tasks.build(TaskSection(**settings), DataSection(train=path))


# the whole way


def recipe_of(folder: Path, home: Path, task: dict[str, Any], rows: str, **more: Any) -> Path:
    import yaml

    path = folder / "recipe.yaml"
    told = {
        "model": {"name": str(home), "precision": "fp32"},
        "task": {"max_length": 48, **task},
        "data": {"train": rows},
        "adapter": {"variant": "lora", "rank": 4, "alpha": 8},
        "train": {"steps": 12, "batch_size": 4, "lr": 1e-2, "log_every": 4, "eval_every": 6},
        "output_dir": str(folder / "run"),
    }
    path.write_text(yaml.safe_dump({**told, **more}))
    return path


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft finds out for GPT-2's linears
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", {"name": "causal-lm", "packing": True, "generate": 2}),
        ("gpt2", {"name": "causal-lm", "format": "prompt"}),
        ("t5", {"name": "seq2seq", "generate": 2}),
    ],
)
def test_a_recipe_is_trained_pruned_loaded_by_peft_and_scored(
    tmp_path: Path,
    homes: dict[str, Path],
    lorakit: Callable[..., Any],
    name: str,
    task: dict[str, Any],
) -> None:
    import peft
    import transformers

    from lorakit.trained import logits, open_trained

    path = recipe_of(tmp_path, homes[name], task, jsonl(tmp_path, [*writers.rows(30)]))
    trained = lorakit("train", path, "--json")
    assert trained.code == 0, trained.err
    assert lorakit("prune", tmp_path / "run").code == 0
    folder = tmp_path / "run" / "pruned"

    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    base = getattr(transformers, kind).from_pretrained(homes[name])
    judge = peft.PeftModel.from_pretrained(base, folder).eval()
    ours = open_trained(tmp_path / "run")
    rows = models.probe(ours.model)
    want = logits(judge, rows)
    assert (logits(ours.model, rows) - want).abs().max() < 1e-4 * want.abs().max()
    assert not list(ours.whole)

    scored = json.loads(lorakit("eval", folder, "--json").out)
    told = json.loads(trained.out)["scores"]
    assert scored["scores"] == pytest.approx(told, rel=1e-4)
    assert set(told) >= {"loss", "perplexity"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """What a run has logged, but for its speed."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "samples_per_s"} for row in rows]


def test_a_run_tells_its_format_and_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, homes: dict[str, Path], lorakit: Callable[..., Any]
) -> None:
    from lorakit import recipe as recipes

    rows = jsonl(tmp_path, [*writers.rows(30)])
    task = {"name": "causal-lm", "packing": True}
    path = recipe_of(tmp_path, homes["llama"], task, rows)
    settings = ("train.save_every=6", "train.patience=null")
    assert lorakit("train", path, *settings).code == 0
    assert recipes.restore(tmp_path / "run").task.format == "prompt"
    want = metrics(tmp_path / "run")

    other = f"output_dir={tmp_path / 'other'}"
    assert lorakit("train", path, *settings, other).code == 0
    checkpoints = tmp_path / "other" / "checkpoints"
    (checkpoints / "last").write_text("step-000006")
    resumed = lorakit("train", path, *settings, other, "--resume")
    assert resumed.code == 0, resumed.err
    assert metrics(tmp_path / "other") == want


def test_a_causal_model_learns_what_it_is_told(
    tmp_path: Path, homes: dict[str, Path], lorakit: Callable[..., Any]
) -> None:
    """One answer to all prompts: after 60 steps it is written word for word."""
    rows = [{"prompt": f"number {i}: ", "completion": "rain falls"} for i in range(20)]
    task = {"name": "causal-lm", "generate": 8}
    path = recipe_of(tmp_path, homes["llama"], task, jsonl(tmp_path, rows))
    settings = ("train.steps=60", "train.lr=5e-2", "adapter.rank=8", "train.eval_every=null")
    scores = json.loads(lorakit("train", path, *settings, "--json").out)["scores"]
    assert (scores["exact_match"], scores["rouge_l"]) == (100, 100)

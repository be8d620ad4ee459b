"""The two sides of the bench do the same work."""

import json
import random
from argparse import Namespace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import bench_train
import peer_trainer
from lorakit import recipe as recipes
from lorakit.prepare import prepare
from works import WORKS

GIVEN = Namespace(
    task="causal",
    rank=4,
    alpha=8,
    lr=1e-3,
    warmup=0.0,
    batch_size=None,
    epochs=1,
    overrides=[],
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with instructions to train and to score, and a model for them."""
    source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "rows"))
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(
            draw.choices(("plain", "words", "of", "many", "kinds"), k=draw.randint(1, most))
        )

    found = [
        {"instruction": f"{words(9)} {i}", "input": words(4), "output": words(700 if i % 9 else 9)}
        for i in range(130)
    ]
    (source / "alpaca_en_demo.json").write_text(json.dumps(found))
    WORKS["causal"].write(source, folder, 30)
    return folder, WORKS["causal"].model(folder)


def test_both_sides_read_and_learn_the_same_tokens(rows: tuple[Path, str]) -> None:
    folder, model = rows
    work = WORKS["causal"]
    _, _, *overrides = bench_train.command("lorakit", GIVEN, work, model, folder, 0)
    prepared = prepare(recipes.load(work.recipe, overrides))
    ours = prepared.task.encoded("train").columns  # type: ignore[attr-defined]
    peer = Namespace(
        data_dir=folder, model=model, max_length=work.max_length, batch_size=4, chunks=False
    )
    theirs = peer_trainer.language(peer, AutoTokenizer.from_pretrained(model))
    assert len(theirs.train) == 30
    for name in ("input_ids", "labels"):
        assert [list(row) for row in ours[name]] == theirs.train[name]
    assert max(map(len, theirs.train["input_ids"])) == work.max_length  # some are cut


def test_chunks_hold_the_same_tokens_but_for_a_rest(rows: tuple[Path, str]) -> None:
    folder, model = rows
    peer = Namespace(data_dir=folder, model=model, max_length=64, batch_size=4, chunks=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    whole = peer_trainer.language(Namespace(**{**vars(peer), "chunks": False}), tokenizer)
    chunked = peer_trainer.language(peer, tokenizer)
    joined = [token for row in whole.train["input_ids"] for token in row]
    cut = [token for row in chunked.train["input_ids"] for token in row]
    assert {len(row) for row in chunked.train["labels"]} == {64}
    assert cut == joined[: len(cut)]
    assert len(joined) - len(cut) < 64


@pytest.mark.parametrize("task", WORKS)
def test_what_each_adds_makes_a_recipe(task: str, tmp_path: Path) -> None:
    work = WORKS[task]
    for who in (who for who in work.who if who.startswith("lorakit")):
        typed = bench_train.command(who, GIVEN, work, "tiny", tmp_path, 0)
        loaded = recipes.load(work.recipe, typed[2:])
        assert (loaded.adapter.rank, loaded.train.accumulate) == (4, 1)
        assert loaded.train.steps is None

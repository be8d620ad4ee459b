"""What the card of a pruned folder says is true, and its Python runs."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import writers
import yaml
from conftest import Answer, jsonl
from torch.testing import assert_close

from lorakit import models
from lorakit.base import settled
from lorakit.trained import logits, open_trained

Lorakit = Callable[..., Answer]
RUN = Path("runs/tiny")
ROWS = [
    {"text": f"{'a warm' if i % 2 else 'a dull'} film {i}", "label": "ab"[i % 2]} for i in range(24)
]


def pruned(recipe: Path, lorakit: Lorakit, **changes: dict[str, Any]) -> str:
    """The card of a run of two steps."""
    given = yaml.safe_load(recipe.read_text())
    for section, keys in {"train": {"steps": 2, "lr": 0.05, "save_every": None}, **changes}.items():
        given[section] |= keys
    recipe.write_text(yaml.safe_dump(given))
    for command in (("train", recipe), ("prune", RUN)):
        answer = lorakit(*command)
        assert answer.code == 0, answer.err
    return (RUN / "pruned" / "README.md").read_text()


def check(card: str, **names: Any) -> None:
    """The model that the card's Python loads answers as ours does."""
    named: dict[str, Any] = {"FOLDER": RUN / "pruned", **names}
    exec(card.partition("```python\n")[2].partition("```")[0], named)
    for module in named["model"].modules():
        settled(module)
    ours = open_trained(RUN / "pruned").model
    rows = models.probe(ours)
    assert_close(logits(named["model"].eval(), rows), logits(ours, rows), rtol=0, atol=1e-5)


def test_the_card_tells_how_to_load_and_what_was_kept(recipe: Path, lorakit: Lorakit) -> None:
    card = pruned(recipe, lorakit)
    told = json.loads((RUN / "pruned" / "lorakit.json").read_text())
    assert f"{sum(told['ranks'].values())} of {sum(told['start'].values())} ranks kept" in card
    assert "AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels=2)" in card
    assert "bad, good" in card
    assert str(Path.cwd()) not in card
    check(card)


@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_the_card_tells_peft_how_the_base_was_stored(
    recipe: Path, lorakit: Lorakit, codes: str
) -> None:
    card = pruned(recipe, lorakit, model={"quantize": codes})
    assert f"stored in {codes} codes" in card
    check(card)


@pytest.mark.parametrize(
    ("task", "model", "packaged"),
    [
        ("classification", {}, False),
        ("causal-lm", {}, True),
        ("causal-lm", {"quantize": "nf4"}, False),
    ],
)
def test_a_base_in_a_gguf_file_is_loaded_first(
    recipe: Path,
    lorakit: Lorakit,
    task: str,
    model: dict[str, Any],
    packaged: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = package("models") if packaged else Path("models")
    folder.mkdir(parents=True, exist_ok=True)
    writers.gguf_file(folder / "tiny.gguf")
    monkeypatch.syspath_prepend("site")
    jsonl(Path(), ROWS)
    name = "package:some-models/models/tiny.gguf" if packaged else "models/tiny.gguf"
    card = pruned(
        recipe,
        lorakit,
        model={"name": name, **model},
        task={"name": task},
        data={"train": "rows.jsonl"},
    )
    assert "base_model:" not in card, "which is the hub's word"
    assert "PEFT does not find this base by its name" in card
    check(card, DIR="models")


def test_a_base_in_a_package_is_loaded_first(
    recipe: Path, lorakit: Lorakit, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("models").symlink_to(tiny)
    monkeypatch.syspath_prepend("site")
    card = pruned(recipe, lorakit, model={"name": "package:some-models/models"})
    assert "distribution('some-models').locate_file('models')" in card
    check(card)


def package(inside: str) -> Path:
    """An installed package of the name some-models in `site`; gives a path inside of it."""
    facts = Path("site/some_models-1.0.dist-info")
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: some-models\nVersion: 1.0\n")
    return Path("site") / inside


# what it was trained on


def test_the_rows_are_named_by_what_they_hold_from_the_run_to_the_last_folder(
    recipe: Path, lorakit: Lorakit, reviews: Path
) -> None:
    card, expected = pruned(recipe, lorakit), f"sha256:{sha256(reviews.read_bytes()).hexdigest()}"
    known = json.loads((RUN / "environment.json").read_text())["revisions"]
    assert known == {"model": None, "data": {"data.train": expected}}
    assert f"data.train `{expected}`" in card
    assert lorakit("prune", RUN / "pruned", "--rank", 1, "--out", "again").code == 0
    assert lorakit("merge", RUN / "pruned", "--out", "merged").code == 0
    for folder in (RUN / "pruned", Path("again")):
        told = json.loads((folder / "lorakit.json").read_text())
        assert told["origins"] == {"data.train": expected}
    for name in ("again", "merged"):
        assert f"data.train `{expected}`" in (Path(name) / "README.md").read_text()


def test_a_run_does_not_go_on_over_other_rows_unless_it_is_forced_to(
    recipe: Path, lorakit: Lorakit, reviews: Path
) -> None:
    rows = Path("rows.csv")
    rows.write_bytes(reviews.read_bytes())
    changes = {"data": {"train": "rows.csv"}, "train": {"steps": 6, "save_every": 3}}
    pruned(recipe, lorakit, **changes)
    rows.write_text(rows.read_text() + "one more row,good\n")
    assert lorakit("train", RUN, "--resume").code == 2
    answer = lorakit("train", RUN, "--resume")
    assert "was trained on other rows: 1 fault\n  data.train: sha256:" in answer.err
    assert "Put them back, or go on by --force." in answer.err
    forced = lorakit("train", RUN, "--resume", "--force")
    assert forced.code == 0, forced.err
    assert "WARNING: " in forced.err

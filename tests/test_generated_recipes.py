"""Recipes drawn from the sections themselves, some hundred of those that
scripts/generated_recipes.py draws by the thousand.
"""

import random
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit import recipe as recipes
from lorakit.schema import Section
from lorakit.sections import keys

ROOT = Path(__file__).parents[1]
MADE = runpy.run_path(str(ROOT / "scripts" / "generated_recipes.py"))
RECIPES = MADE["drawn"](MADE["ANY"])
PLAIN = {
    "model": {"name": "some/base"},
    "task": {"name": "glue/sst2"},
    "adapter": {"variant": "sora", "sparsity": {"lambda": 1.0}},
    "output_dir": "runs/x",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of rows for each task."""
    folder = tmp_path_factory.mktemp("generated")
    MADE["write_rows"](folder)
    return folder


@settings(max_examples=60)
@given(RECIPES)
def test_what_is_of_its_types_is_read_once_what_contradicts_it_is_taken_out(
    place: Path, drawn: dict[str, Any]
) -> None:
    MADE["mended"](place / "recipe.yaml", drawn)


@settings(max_examples=40)
@given(RECIPES, st.integers(0, 10**9))
def test_what_is_broken_is_refused_by_the_name_of_its_key(
    place: Path, drawn: dict[str, Any], number: int
) -> None:
    path = place / "recipe.yaml"
    for broken in MADE["mutations"](MADE["mended"](path, drawn), random.Random(number)):
        MADE["refused"](path, broken)


def test_what_is_read_is_dry_run_or_told_what_does_not_fit(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    ended: Counter[int] = Counter()

    def run(drawn: dict[str, Any]) -> None:
        ended[MADE["dry_run"](place, drawn)] += 1

    there = MADE["there"](ROOT / "tests" / "data" / "base")
    MADE["by_the"](12, 0, MADE["drawn"](there), run, Counter())
    assert ended.total() == 12
    assert ended[0] > 8


def test_every_key_is_drawn() -> None:
    drawn: set[str] = set()

    def look(example: Any, prefix: str = "") -> None:
        for key, value in example.items():
            drawn.add(prefix + key)
            if isinstance(value, dict):
                look(value, f"{prefix}{key}.")

    for number in range(20):  # which are drawn early hangs on what was imported before
        if not set(keys()) <= drawn:
            MADE["by_the"](250, number, RECIPES, look, Counter())
    assert set(keys()) <= drawn


@pytest.mark.parametrize("kind", ["unknown", "wrong", "missing", "twice"])
def test_the_command_ends_in_code_2_and_one_message(
    tmp_path: Path, lorakit: Callable[..., Answer], kind: str
) -> None:
    for number in range(5):
        broken = MADE[kind](PLAIN, random.Random(number))
        path = tmp_path / "recipe.yaml"
        path.write_text(broken.text)
        answer = lorakit("train", path, "--dry-run")
        assert (answer.code, answer.out) == (2, ""), broken.text
        first, *more = answer.err.splitlines()
        assert first.startswith("error: ")
        assert more
        assert all(line.startswith("  ") for line in more)
        assert broken.key in answer.err


# the search sees what it looks for


def test_a_type_that_no_values_are_known_for_is_told() -> None:
    class Strange(Section):
        when: complex = 1j

    with pytest.raises(TypeError, match=r"when: no values for .*complex"):
        MADE["section"](Strange, MADE["ANY"])


def test_a_value_of_a_wrong_type_is_no_contradiction(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="what is of its type is refused"):
        MADE["mended"](tmp_path / "r.yaml", PLAIN | {"seed": "x"})


def test_a_broken_recipe_that_is_read_or_whose_key_is_not_named_is_found(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    assert MADE["refusal"](path, PLAIN) is None
    with pytest.raises(AssertionError, match="seed is wrong, and the recipe is read"):
        MADE["refused"](path, MADE["Broken"](path.read_text(), "seed"))
    with pytest.raises(AssertionError, match=r"train\.lr is not named"):
        MADE["refused"](path, MADE["Broken"]("seed: x", "train.lr"))


def test_a_recipe_that_does_not_come_back_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "dump", lambda recipe: recipes.as_yaml({**PLAIN, "seed": 7}))
    with pytest.raises(AssertionError, match="it does not come back"):
        MADE["mended"](tmp_path / "r.yaml", PLAIN)

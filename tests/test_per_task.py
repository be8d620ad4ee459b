"""One recipe for several tasks: `per_task` says what differs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorakit import recipe as recipes
from lorakit import shipped
from lorakit.errors import RecipeError
from lorakit.tasks import glue

GIVEN = """\
model: {name: some/model}
task: {name: glue/sst2}
adapter: {variant: lora, rank: 8}
train: {lr: 1e-3, epochs: 10}
output_dir: runs/x
per_task:
  glue/rte: {train.lr: 1.2e-3, train.epochs: 50, adapter.rank: 2, task.max_length: 320}
  glue/cola: {adapter.lr_ratio: 4.0}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(GIVEN)
    return file


@pytest.fixture
def faults(tmp_path: Path) -> Callable[..., list[str]]:
    def ask(text: str, *overrides: str) -> list[str]:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        with pytest.raises(RecipeError) as caught:
            recipes.load(file, overrides)
        return [line.strip() for line in str(caught.value).splitlines()[1:]]

    return ask


def test_a_task_that_the_table_leaves_out_has_the_recipes_own_settings(path: Path) -> None:
    recipe = recipes.load(path)
    assert (recipe.train.lr, recipe.train.epochs, recipe.adapter.rank) == (1e-3, 10, 8)


def test_the_task_named_on_the_command_line_brings_its_settings(path: Path) -> None:
    recipe = recipes.load(path, ["task.name=glue/rte"])
    assert (recipe.train.lr, recipe.train.epochs, recipe.adapter.rank) == (1.2e-3, 50, 2)
    assert recipe.task.max_length == 320


def test_the_command_line_has_the_last_word(path: Path) -> None:
    recipe = recipes.load(path, ["task.name=glue/rte", "train.lr=5e-4", "~train.epochs"])
    assert (recipe.train.lr, recipe.train.epochs) == (5e-4, 3)


def test_a_run_keeps_what_was_chosen_and_no_table(path: Path) -> None:
    recipe = recipes.load(path, ["task.name=glue/rte"])
    written = yaml.safe_load(recipes.dump(recipe))
    assert "per_task" not in written
    path.write_text(recipes.dump(recipe))
    assert recipes.load(path) == recipe


def test_a_section_may_be_set_whole(path: Path) -> None:
    path.write_text(
        GIVEN.replace("variant: lora", "variant: sora").replace(
            "lr_ratio: 4.0", "sparsity: {xi: 1e-3}"
        )
    )
    assert recipes.load(path, ["task.name=glue/cola"]).adapter.sparsity.xi == 1e-3


def test_an_unknown_key_or_task_of_the_table_is_told_with_line_and_nearest_name(
    faults: Callable[..., list[str]],
) -> None:
    told = faults(GIVEN.replace("train.lr: 1.2e-3", "train.lrr: 1"), "task.name=glue/rte")
    assert told == ["line 7: per_task.glue/rte: train.lrr: no such key. Nearest: 'lr'."]
    told = faults(GIVEN.replace("glue/cola", "glue/colla"))
    assert "line 8: per_task: no task 'glue/colla'. Nearest: 'glue/cola'." in told[0]


def test_a_value_of_the_table_that_cannot_hold_is_told_with_its_line(
    faults: Callable[..., list[str]],
) -> None:
    told = faults(GIVEN.replace("train.epochs: 50", "train.epochs: -1"), "task.name=glue/rte")
    assert told == ["line 7: train.epochs: -1: expected a number above 0."]


@pytest.mark.parametrize(
    "table", ["per_task: 3", "per_task: [glue/rte]", "per_task: {glue/rte: 3}"]
)
def test_a_table_of_another_form_is_refused(faults: Callable[..., list[str]], table: str) -> None:
    text = GIVEN.partition("per_task")[0] + table
    assert faults(text) == ["line 6: per_task: expected task names, each with dotted keys."]


OF_GLUE = sorted(path.stem for path in shipped.recipes().values() if path.stem.startswith("glue_"))


@pytest.mark.parametrize("task", [name for name in glue.NAMES if name != "glue/wnli"])
@pytest.mark.parametrize("name", OF_GLUE)
def test_every_recipe_of_glue_holds_for_every_task_in_a_folder_of_its_own(
    name: str, task: str
) -> None:
    recipe = recipes.load(shipped.find(name), [f"task.name={task}"])
    assert recipe.output_dir == f"runs/glue-{recipe.adapter.variant}-{task.partition('/')[2]}"


def test_each_method_has_a_recipe_of_glue() -> None:
    assert [recipes.load(shipped.find(name)).adapter.variant for name in OF_GLUE] == [
        "adalora", "blora", "lora", "olora", "sora",
    ]  # fmt: skip

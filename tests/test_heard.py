"""Which settings each task listens to: what it would ignore is refused, with its dotted key."""

from pathlib import Path
from typing import Any

import pytest

from lorakit import recipe as recipes
from lorakit import tasks
from lorakit.data import DataSection
from lorakit.errors import RecipeError
from lorakit.tasks import TaskSection, glue
from lorakit.yamltext import dump, written

LANGUAGE = ("causal-lm", "seq2seq")
LABELLED = ("classification", "regression", "multi-label", "token-classification")
HUB = "hub:owner/name"
ALL: dict[str, tuple[Any, tuple[str, ...]]] = {
    "task.data_dir": ("glue", glue.NAMES),
    "task.max_length": (7, (*glue.NAMES, *LABELLED, *LANGUAGE)),
    "task.format": ("prompt", LANGUAGE),
    "task.template": ("{a}", LANGUAGE),
    "task.loss_on": ("all", ("causal-lm",)),
    "task.packing": (True, ("causal-lm",)),
    "task.generate": (3, LANGUAGE),
    "data.train_split": ("other", (*LABELLED, *LANGUAGE)),
    "data.validation": (HUB, (*LABELLED, *LANGUAGE)),
    "data.validation_split": ("test", (*LABELLED, *LANGUAGE)),
    "data.revision": ("v2", (*LABELLED, *LANGUAGE)),
    "data.held_out": (0.5, (*LABELLED, *LANGUAGE)),
    "data.split_seed": (3, (*LABELLED, *LANGUAGE)),
    "data.text": ("words", (*LABELLED, *LANGUAGE)),
    "data.label": ("said", (*LABELLED, *LANGUAGE)),
    "data.labels": (["a", "b"], ("classification", "multi-label", "token-classification")),
    "data.separator": (";", ("multi-label",)),
    "data.deduplicate": (False, (*LABELLED, *LANGUAGE)),
}
"""Of every setting, a value that is not its default, and the tasks that do something with it."""


def given(name: str, **settings: Any) -> dict[str, Any]:
    """A recipe of the task `name` with more `settings`, by dotted key."""
    found: dict[str, Any] = {
        "model": {"name": "some/model"},
        "task": {"name": name},
        "adapter": {"variant": "lora"},
        "output_dir": "run",
    }
    if name not in glue.TASKS or any(dotted.startswith("data.") for dotted in settings):
        found["data"] = {"train": HUB}
    for dotted, value in settings.items():
        section, _, key = dotted.partition(".")
        found.setdefault(section, {})[key] = value
    return found


def loaded(folder: Path, settings: dict[str, Any]) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(dump(settings))
    return recipes.load(path)


def faults(folder: Path, settings: dict[str, Any]) -> list[str]:
    with pytest.raises(RecipeError) as refusal:
        loaded(folder, settings)
    _, *told = str(refusal.value).splitlines()
    return told


def test_every_setting_of_a_task_and_its_rows_is_in_the_table() -> None:
    keys = {
        *(f"task.{key}" for key in TaskSection.model_fields),
        *(f"data.{key}" for key in DataSection.model_fields),
    }
    assert keys - {"task.name", "data.train"} == ALL.keys()


@pytest.mark.parametrize("name", [name for name in tasks.names() if name != "glue/ax"])
@pytest.mark.parametrize("key", ALL)
def test_a_setting_that_the_task_would_ignore_is_refused_and_no_other(
    tmp_path: Path, name: str, key: str
) -> None:
    value, hearing = ALL[key]
    settings = given(name, **{key: value})
    if name in hearing:
        section, _, field = key.partition(".")
        kept = getattr(getattr(loaded(tmp_path, settings), section), field)
        assert kept == (tuple(value) if isinstance(value, list) else value)
        return
    (fault,) = faults(tmp_path, settings)
    if name in glue.TASKS and key.startswith("data."):
        assert f"data: {name} brings its own rows; `data` would be ignored." in fault
        return
    assert f" {key}: {written(value)}: {name} would ignore it; it is for " in fault
    for other in hearing:
        assert ("GLUE's tasks" if other in glue.TASKS else other) in fault


def test_all_that_is_ignored_is_told_at_once_each_at_its_line(tmp_path: Path) -> None:
    settings = given("regression", **{"data.labels": ["1", "2"], "data.separator": ";"})
    told = faults(tmp_path, settings)
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    keys = {"labels": "['1', '2']", "separator": "';'"}
    for fault, (key, value) in zip(told, keys.items(), strict=True):
        line = next(i for i, text in enumerate(lines, start=1) if f"{key}:" in text)
        assert f"  line {line}: data.{key}: {value}: regression would ignore it" in fault


@pytest.mark.parametrize(
    ("name", "settings", "fault"),
    [
        ("token-classification", {}, "data.text: [a, b]: expected one column, of lists of words."),
        ("causal-lm", {}, "data.text: [a, b]: expected one column; several go into task.template."),
        ("seq2seq", {}, "data.text: [a, b]: expected one column; several go into task.template."),
    ],
)
def test_a_pair_of_columns_is_refused_where_one_text_is_read(
    tmp_path: Path, name: str, settings: dict[str, Any], fault: str
) -> None:
    (told,) = faults(tmp_path, given(name, **{"data.text": ["a", "b"]}))
    assert told.endswith(fault)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            {"task.template": "{a} {b}", "data.text": "a"},
            "data.text: 'a': would be ignored; the prompt's columns are those of task.template.",
        ),
        (
            {"task.format": "alpaca", "data.text": "a"},
            "data.text: 'a': would be ignored; alpaca's columns are instruction, input and output.",
        ),
        *(
            (
                {"task.format": form, "data.label": "a"},
                f"data.label: 'a': would be ignored; rows of {form} have no such column.",
            )
            for form in ("alpaca", "chat", "text")
        ),
        (
            {"data.train": "rows.csv", "data.revision": "main"},
            "data.revision: 'main': only a data set of the hub has revisions: hub:OWNER/NAME.",
        ),
    ],
)
def test_a_column_or_revision_that_nothing_would_read_is_refused(
    tmp_path: Path, settings: dict[str, Any], fault: str
) -> None:
    (told,) = faults(tmp_path, given("causal-lm", **settings))
    assert told.endswith(fault)

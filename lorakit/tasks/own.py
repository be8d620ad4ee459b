"""Tasks whose rows come from the `data` section, and which settings each task listens to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from pydantic.fields import FieldInfo

from lorakit.data import DataSection, dialogues, labels, read, settled
from lorakit.data.formats import Wanted
from lorakit.data.labels import Kind
from lorakit.errors import DataError
from lorakit.tasks import glue
from lorakit.tasks.causal import CausalTask
from lorakit.tasks.classification import Classification
from lorakit.tasks.multilabel import MultiLabel
from lorakit.tasks.regression import Regression, pearson, rmse, spearman
from lorakit.tasks.seq2seq import Seq2SeqTask
from lorakit.tasks.texts import TextTask
from lorakit.tasks.tokens import TokenTask

if TYPE_CHECKING:
    from lorakit.tasks import Task, TaskSection


class Settled(NamedTuple):
    """What a recipe leaves to be found from its rows, found, as far as prompts and columns go."""

    task: TaskSection
    data: DataSection | None
    notes: tuple[str, ...] = ()
    """What was found, to be said aloud, where the rows do not say it when they are read."""


class Own(NamedTuple):
    """One such task."""

    build: Callable[[TaskSection, DataSection], Task]
    """Reads the rows; raises DataError where one is not what the task needs."""
    settle: Callable[[TaskSection, DataSection], Settled]
    """Looks at the first row; raises DataError where no column, or no format, fits it."""
    hears: tuple[str, ...] = ()
    """Of the settings that only some tasks listen to, those that it does."""
    no_pair: str = ""
    """Why a text may not be in two columns; empty: it may."""


def misfits(section: TaskSection, data: DataSection) -> dict[str, str]:
    """What the task would ignore of the section `data`, or cannot take: reasons by key."""
    given = [key for key, field in type(data).model_fields.items() if _is_set(data, key, field)]
    found = {key: why for key in given if (why := ignored(section.name, f"data.{key}"))}
    if isinstance(data.text, tuple) and OWN[section.name].no_pair:
        found["text"] = OWN[section.name].no_pair
    elif "text" in given and section.template is not None:
        found["text"] = "would be ignored; the prompt's columns are those of task.template"
    elif "text" in given and section.format == "alpaca":
        found["text"] = "would be ignored; alpaca's columns are instruction, input and output"
    if "label" in given and section.format in ("alpaca", "chat", "text"):
        found["label"] = f"would be ignored; rows of {section.format} have no such column"
    return found


def ignored(name: str, key: str) -> str:
    """Why the task `name` refuses the setting `key`; empty where it listens to it."""
    hearing = [other for other in HEARD if key in HEARD[other]]
    if not hearing or name in hearing:
        return ""
    whose = [other for other in hearing if other in OWN] or ["GLUE's tasks"]
    told = " and ".join(filter(None, (", ".join(whose[:-1]), whose[-1])))
    return f"{name} would ignore it; it is for {told}"


def _is_set(data: DataSection, key: str, field: FieldInfo) -> bool:
    return not field.is_required() and getattr(data, key) != field.default


def _columns(kind: Kind) -> Callable[[TaskSection, DataSection], Settled]:
    """Of texts with labels: which columns they are in."""
    return lambda section, data: Settled(section, *settled(data, kind))


def _layout(section: TaskSection, data: DataSection) -> Settled:
    """Of texts to write: their format, and the columns where a recipe may name them."""
    found = dialogues.layout_of(data, _wanted(section, data))
    columns = {"text": found.prompt or data.text, "label": found.completion or data.label}
    told = section.model_copy(update={"format": found.format})
    return Settled(told, data.model_copy(update=columns))


def _wanted(section: TaskSection, data: DataSection) -> Wanted:
    """What the recipe says of the columns of rows whose answer is text."""
    assert not isinstance(data.text, tuple)  # the recipe has refused it
    named = None if section.format == "auto" else section.format
    return Wanted(named, section.template, data.text, data.label)


def _classification(section: TaskSection, data: DataSection) -> Task:
    splits = read(data, labels.ONE)
    return TextTask(splits, section.max_length, Classification(splits.labels))


def _regression(section: TaskSection, data: DataSection) -> Task:
    metrics = (pearson, spearman, rmse)
    return TextTask(read(data, labels.NUMBER), section.max_length, Regression(metrics))


def _multi_label(section: TaskSection, data: DataSection) -> Task:
    splits = read(data, labels.SEVERAL)
    return TextTask(splits, section.max_length, MultiLabel(splits.labels))


def _tokens(section: TaskSection, data: DataSection) -> Task:
    return TokenTask(read(data, labels.TAGS), section.max_length)


def _causal(section: TaskSection, data: DataSection) -> Task:
    splits = dialogues.read(data, _wanted(section, data))
    if section.generate is not None and splits.rows["train"].format == "text":
        raise DataError("task.generate: rows are read as text: they have no prompts to answer.")
    told = section.generate, section.loss_on, section.packing
    return CausalTask(splits, section.max_length, *told)


def _seq2seq(section: TaskSection, data: DataSection) -> Task:
    splits = dialogues.read(data, _wanted(section, data))
    if (found := splits.rows["train"].format) not in ("prompt", "alpaca"):
        raise DataError(f"task.format: seq2seq needs prompts with completions; rows are {found}.")
    return Seq2SeqTask(splits, section.max_length, section.generate)


_PROMPTS = ("task.format", "task.template", "task.generate")
_ONE_TEXT = "expected one column; several go into task.template"
OWN: Mapping[str, Own] = {
    "classification": Own(_classification, _columns(labels.ONE), ("data.labels",)),
    "regression": Own(_regression, _columns(labels.NUMBER)),
    "multi-label": Own(_multi_label, _columns(labels.SEVERAL), ("data.labels", "data.separator")),
    "token-classification": Own(
        _tokens, _columns(labels.TAGS), ("data.labels",), "expected one column, of lists of words"
    ),
    "causal-lm": Own(_causal, _layout, (*_PROMPTS, "task.loss_on", "task.packing"), _ONE_TEXT),
    "seq2seq": Own(_seq2seq, _layout, _PROMPTS, _ONE_TEXT),
}
"""By name."""
HEARD: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(glue.TASKS, ("task.data_dir",)),
    **{name: own.hears for name, own in OWN.items()},
}
"""The settings that only some tasks listen to, by the task's name."""

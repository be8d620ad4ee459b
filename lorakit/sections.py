"""All sections of a recipe, composed, and which keys stand where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args

from pydantic import Field, NonNegativeInt, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from lorakit import variants
from lorakit.adapter import VariantConfig
from lorakit.data import DataSection
from lorakit.models import ModelSection
from lorakit.schema import Section, refuse_below
from lorakit.tasks import TaskSection, glue
from lorakit.tasks.own import OWN, misfits
from lorakit.timetable import TrainSection
from lorakit.yamltext import Path as KeyPath

if TYPE_CHECKING:
    AnyVariant = VariantConfig
else:
    AnyVariant = Annotated[
        Union[tuple(variants.get(name).config for name in variants.names())],  # noqa: UP007 dynamic
        Field(discriminator="variant"),
    ]


class Recipe(Section):
    """All of a run's settings. Written into its folder, they rebuild it."""

    model: ModelSection
    task: TaskSection
    data: DataSection | None = Field(None, validate_default=True)
    """The rows of a `classification` task; GLUE tasks bring their own."""
    adapter: AnyVariant
    train: TrainSection = TrainSection()
    output_dir: str = Field(min_length=1)
    """The run folder to make. An existing one is never written into, except by `--resume`."""
    seed: NonNegativeInt = 0
    """Of the head's and the adapter's start, dropout and the order of rows."""
    per_task: dict[str, dict[str, Any]] = Field(default_factory=dict, exclude=True)
    """Dotted keys that hold for single tasks, by the task's name; those of the task that the
    recipe or the command line names are applied when a recipe is read, and written into the run
    where they belong."""

    @field_validator("task")
    @classmethod
    def _task_has_rows_to_train_on(cls, task: TaskSection) -> TaskSection:
        if task.name not in (*glue.NAMES, *OWN):
            raise ValueError(
                f"{task.name} is only for scoring; train glue/mnli, then eval --task {task.name}"
            )
        return task

    @field_validator("data")
    @classmethod
    def _data_fits_task(cls, data: Any, others: ValidationInfo) -> Any:
        task = others.data.get("task")
        if task is not None and task.name in OWN and data is None:
            raise ValueError(f"task.name {task.name} needs a `data` section with its files")
        if task is not None and task.name not in OWN and data is not None:
            raise ValueError(f"{task.name} brings its own rows; `data` would be ignored")
        if task is not None and data is not None:
            refuse_below(misfits(task, data), data)
        return data


def keys() -> list[str]:
    """Every dotted key a run has, over all variants."""
    found = dict.fromkeys(_keys_of(Recipe, ""))
    for name in variants.names():
        found.update(dict.fromkeys(_keys_of(variants.get(name).config, "adapter.")))
    return list(found)


def variants_with(key: str) -> list[str]:
    """The variants whose own section has `key`."""
    return [name for name in variants.names() if key in fields(variants.get(name).config)]


def fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Fields by the name a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def section_at(path: KeyPath, data: Any) -> type[Section] | None:
    """The section whose keys stand at `path`; None below a field of free keys, or off the map."""
    section: type[Section] | None = Recipe
    for key in path:
        field = fields(section).get(str(key)) if section else None
        data = data.get(key, {}) if isinstance(data, Mapping) else {}
        section = _section_in(field, data) if field else None
    return section


def field_at(path: KeyPath, data: Any) -> FieldInfo | None:
    """The field at `path`, if there is one."""
    section = section_at(path[:-1], data)
    return fields(section).get(str(path[-1])) if section else None


def takes_free_keys(path: KeyPath, data: Any) -> bool:
    """Whether `path` is a field that takes keys of the user's own, like `adapter.ranks`."""
    section = section_at(path[:-1], data) if path else None
    field = fields(section).get(str(path[-1])) if section else None
    return field is not None and str(field.annotation).startswith("dict")


def path_of(dotted: str, data: Any) -> tuple[str, ...]:
    """`a.b.c` cut at its dots, as far as sections reach: names of modules have dots themselves."""
    path = tuple(dotted.split("."))
    for i in range(1, len(path)):
        if takes_free_keys(path[:i], data):
            return (*path[:i], ".".join(path[i:]))
    return path


def _keys_of(section: type[Section], prefix: str) -> Iterable[str]:
    for name, field in fields(section).items():
        if not field.exclude:  # told when a recipe is read, and gone then
            yield prefix + name
        if (below := _section_in(field, {})) is not None:
            yield from _keys_of(below, f"{prefix}{name}.")


def _section_in(field: FieldInfo, data: Any) -> type[Section] | None:
    """The section a field holds, if it does; the variant's own where `data` names one."""
    if field.discriminator is not None:
        name = data.get("variant") if isinstance(data, Mapping) else None
        return variants.get(name).config if name in variants.names() else VariantConfig
    options = get_args(field.annotation) or (field.annotation,)
    sections = [t for t in options if isinstance(t, type) and issubclass(t, Section)]
    return sections[0] if sections else None

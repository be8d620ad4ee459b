"""A recipe: what is tuned, on what, by which variant and how. Read, overridden, checked, dumped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, get_args

import yaml
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from lorakit import variants
from lorakit.adapter import VariantConfig
from lorakit.data import DataSection
from lorakit.errors import RecipeError, nearest, no_such, several
from lorakit.foreign_keys import BY_COMMAND, HERE
from lorakit.models import ModelSection
from lorakit.schema import Section
from lorakit.tasks import TaskSection
from lorakit.train import TrainSection
from lorakit.yamltext import Document, parse, scalar
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
    data: DataSection | None = None
    """The rows of a `classification` task; GLUE tasks bring their own."""
    adapter: AnyVariant
    train: TrainSection = TrainSection()
    output_dir: str
    """The run folder to make. An existing one is never written into, except by `--resume`."""
    seed: NonNegativeInt = 0
    """Of the head's and the adapter's start, dropout and the order of rows."""

    @model_validator(mode="after")
    def _data_fits_task(self) -> Self:
        if self.task.name == "classification" and self.data is None:
            raise ValueError("task.name classification needs a `data` section with its files")
        if self.task.name != "classification" and self.data is not None:
            raise ValueError(f"{self.task.name} brings its own rows; `data` would be ignored")
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe at `path`, with `key=value` and `~key` applied on top.

    Raises:
        RecipeError: the file is missing or no mapping, or keys or values are wrong: all of them
            are listed, with line, dotted key, what was expected and the nearest valid name.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}.") from None
    document = parse(text, str(path))
    for override in overrides:
        _apply(override, document)
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        document.faults.extend(_explain(fault, document) for fault in error.errors())
    if document.faults:
        raise RecipeError(several(str(path), document.faults))
    return recipe


def restore(folder: Path) -> Recipe:
    """The recipe that a run, a checkpoint or a pruned folder carries."""
    return load(folder / "recipe.yaml")


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load` reads back to the same."""
    plain = recipe.model_dump(mode="json")
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def differences(one: Recipe, other: Recipe) -> list[str]:
    """`train.lr: 0.001 there, 0.01 here` for each key in which two recipes differ."""
    there, here = (dict(_leaves(r.model_dump(mode="json"))) for r in (one, other))
    return [
        f"{key}: {there.get(key, 'absent')} there, {here.get(key, 'absent')} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]


def keys() -> list[str]:
    """Every dotted key a recipe may have, over all variants."""
    found = dict.fromkeys(_keys_of(Recipe, ""))
    for name in variants.names():
        found.update(dict.fromkeys(_keys_of(variants.get(name).config, "adapter.")))
    return list(found)


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _fields(section: type[Section]) -> dict[str, FieldInfo]:
    """Fields by the name a recipe uses."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _keys_of(section: type[Section], prefix: str) -> Iterable[str]:
    for name, field in _fields(section).items():
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


def _section_at(path: KeyPath, data: Any) -> type[Section] | None:
    """The section whose keys stand at `path`; None below a field of free keys, or off the map."""
    section: type[Section] | None = Recipe
    for key in path:
        field = _fields(section).get(str(key)) if section else None
        data = data.get(key, {}) if isinstance(data, Mapping) else {}
        section = _section_in(field, data) if field else None
    return section


def _apply(override: str, document: Document) -> None:
    """Writes one `a.b=c` or `~a.b` into the document, or a fault where it names nothing."""
    unset = override.startswith("~")
    dotted, equals, text = override.removeprefix("~").partition("=")
    path = tuple(dotted.split("."))
    place = f"override {override!r}"
    if bool(equals) == unset or not dotted:
        document.faults.append(f"{place}: write key=value, or ~key for the default.")
        return
    section = _section_at(path[:-1], document.data)
    free = _is_free(path[:-1], document.data)
    if not free and (section is None or path[-1] not in _fields(section)):
        document.faults.append(f"{place}: {_unknown(path, document.data)}")
        return
    parents: dict[str, Any] = document.data
    for key in path[:-1]:
        if not isinstance(parents.get(key), dict):
            parents[key] = {}
        parents = parents[key]
    if unset:
        parents.pop(path[-1], None)
    else:
        document.places[path] = place
        parents[path[-1]] = scalar(text) if free else _typed(text, _fields(section)[path[-1]])  # type: ignore[arg-type]


def _is_free(path: KeyPath, data: Any) -> bool:
    """Whether `path` is a field that takes keys of the user's own, like `adapter.ranks`."""
    section = _section_at(path[:-1], data) if path else None
    field = _fields(section).get(str(path[-1])) if section else None
    return field is not None and str(field.annotation).startswith("dict")


def _typed(text: str, field: FieldInfo) -> Any:
    """`text` as the YAML value it looks like, or as itself where the field wants a word."""
    value, wanted = scalar(text), field.rebuild_annotation()
    for candidate in (value, text):
        try:
            TypeAdapter(wanted).validate_python(candidate, strict=True)
        except ValidationError:
            continue
        return candidate
    return value


def _unknown(path: KeyPath, data: Any) -> str:
    """`train.lrr: no such key. Nearest: 'lr'.`, or where the thing is that the user means."""
    name, dotted = str(path[-1]), ".".join(map(str, path))
    section = _section_at(path[:-1], data)
    here = list(_fields(section)) if section else []
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == name and key != dotted]
    if name in BY_COMMAND:
        hint = f" `{name}` is {BY_COMMAND[name]} here."
    elif name in HERE:
        hint = f" `{name}` is `{HERE[name]}` here."
    elif near := nearest(name, here):
        hint = near
    elif elsewhere:
        hint = f" Is it `{elsewhere[0]}`?"
    else:
        hint = nearest(name, [key.rpartition(".")[2] for key in keys()])
    if not hint and here:
        hint = f" Known here: {', '.join(here)}."
    return f"{dotted}: no such key.{hint}"


def _explain(fault: Any, document: Document) -> str:
    """One of pydantic's complaints, for people."""
    path = _path_in(fault["loc"], fault["type"], document.data)
    dotted = ".".join(map(str, path)) or "recipe"
    place = next(
        (document.places[path[:i]] for i in range(len(path), 0, -1) if path[:i] in document.places),
        "",
    )
    where = f"{place}: " if place else ""
    given = fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            return where + _unknown(path, document.data)
        case "missing":
            return f"{where}{dotted}: missing."
        case "union_tag_not_found":
            known = ", ".join(variants.names())
            return f"{where}{dotted}.variant: missing. Known: {known}."
        case "union_tag_invalid":
            name = str(given["variant"])
            return f"{where}{dotted}.variant: {no_such('variant', name, variants.names())}"
        case "value_error" if isinstance(given, Mapping):
            return f"{where}{dotted}: {fault['ctx']['error']}."
        case "value_error":
            return f"{where}{dotted}: {fault['ctx']['error']}"
        case "literal_error":
            expected = fault["ctx"]["expected"]
            return f"{where}{dotted}: {given!r}: expected {expected}.{_nearest_of(given, expected)}"
    message = fault["msg"].removeprefix("Input should be ").replace("dictionary", "mapping")
    return f"{where}{dotted}: {given!r}: expected {message}."


def _nearest_of(given: Any, expected: str) -> str:
    return nearest(
        str(given), [word.strip("' ") for word in expected.replace("or", ",").split(",")]
    )


def _path_in(loc: Sequence[str | int], kind: str, data: Any) -> KeyPath:
    """`loc` without pydantic's own steps (a union's branch), which are not in the data."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        inside = isinstance(data, Mapping) and part in data
        item = isinstance(data, tuple) and isinstance(part, int) and part < len(data)
        if inside or item:
            path.append(part)
            data = data[part]
        elif kind == "missing" and i == len(loc) - 1:
            path.append(part)
    return tuple(path)

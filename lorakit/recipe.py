"""A recipe: what is tuned, on what, by which variant and how. Read, overridden, checked, dumped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, Union, get_args

from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from lorakit import variants
from lorakit.adapter import VariantConfig
from lorakit.data import DataSection
from lorakit.errors import RecipeError, nearest, no_such, several
from lorakit.foreign_keys import BY_COMMAND, HERE
from lorakit.models import ModelSection
from lorakit.schema import Section, expected
from lorakit.tasks import TaskSection
from lorakit.train import TrainSection
from lorakit.yamltext import Document, parse, scalar, words, written
from lorakit.yamltext import Path as KeyPath
from lorakit.yamltext import dump as as_yaml

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
    output_dir: str = Field(min_length=1)
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
    for override in sorted(overrides, key=lambda o: not o.startswith("adapter.variant=")):
        _apply(override, document)  # the variant first: it decides which keys there are
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        document.faults.extend(_explain(error, document))
    if document.faults:
        raise RecipeError(several(str(path), document.faults))
    return recipe


def restore(folder: Path) -> Recipe:
    """The recipe that a run, a checkpoint or a pruned folder carries."""
    return load(folder / "recipe.yaml")


def dump(recipe: Recipe) -> str:
    """The recipe with every default written out, as YAML that `load` reads back to the same."""
    return as_yaml(recipe.model_dump(mode="json"))


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
    path, place = _path_of(dotted, document.data), f"override {override!r}"
    if bool(equals) == unset or not all(path):
        document.faults.append(f"{place}: write key=value, or ~key for the default.")
        return
    section = _section_at(path[:-1], document.data)
    field = _fields(section).get(path[-1]) if section else None
    left = unset and dotted in keys()  # of a variant that another override has put away
    if field is None and not left and not _is_free(path[:-1], document.data):
        document.faults.append(f"{place}: {_unknown(path, document.data)}")
        return
    parents: dict[str, Any] = document.data
    for key in path[:-1]:
        if not isinstance(parents.get(key), dict):
            if unset:
                return
            parents[key] = {}
        parents = parents[key]
    for below in [known for known in document.places if known[: len(path)] == path]:
        del document.places[below]
    if unset:
        parents.pop(path[-1], None)
    else:
        document.places[path] = place
        parents[path[-1]] = scalar(text) if field is None else _typed(text, field)


def _path_of(dotted: str, data: Any) -> tuple[str, ...]:
    """`a.b.c` cut at its dots, as far as sections reach: names of modules have dots themselves."""
    path = tuple(dotted.split("."))
    for i in range(1, len(path)):
        if _is_free(path[:i], data):
            return (*path[:i], ".".join(path[i:]))
    return path


def _is_free(path: KeyPath, data: Any) -> bool:
    """Whether `path` is a field that takes keys of the user's own, like `adapter.ranks`."""
    section = _section_at(path[:-1], data) if path else None
    field = _fields(section).get(str(path[-1])) if section else None
    return field is not None and str(field.annotation).startswith("dict")


def _typed(text: str, field: FieldInfo) -> Any:
    """`text` as the YAML value it looks like, or as word or words where the field wants those."""
    value, wanted = scalar(text), field.rebuild_annotation()
    for candidate in (value, text, words(text)):
        try:
            TypeAdapter(wanted).validate_python(candidate, strict=True)
        except ValidationError:
            continue
        return candidate
    return value


def _unknown(path: KeyPath, data: Any) -> str:
    """`train.lrr: no such key. Nearest: 'lr'.`, or where the thing is that the user means."""
    while len(path) > 1 and _field_at(path[:-1], data) is None:
        path = path[:-1]  # the first that is wrong
    name, dotted = str(path[-1]), ".".join(map(str, path))
    section = _section_at(path[:-1], data)
    here = list(_fields(section)) if section else []
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == name]
    if name in BY_COMMAND:
        hint = f" `{name}` is {BY_COMMAND[name]} here."
    elif name in HERE:
        hint = f" `{name}` is `{HERE[name]}` here."
    elif dotted in elsewhere:
        hint = f" It belongs to the variant {' or '.join(_variants_with(name))}."
    elif elsewhere:
        hint = f" Is it {' or '.join(f'`{key}`' for key in elsewhere)}?"
    elif not (hint := nearest(name, here)):
        hint = f" Known here: {', '.join(here)}." if here else ""
    return f"{dotted}: no such key.{hint}"


def _variants_with(key: str) -> list[str]:
    return [name for name in variants.names() if key in _fields(variants.get(name).config)]


def _field_at(path: KeyPath, data: Any) -> FieldInfo | None:
    section = _section_at(path[:-1], data)
    return _fields(section).get(str(path[-1])) if section else None


def _about(path: KeyPath, data: Any) -> str:
    """What the recipe's reference says of a key, after a blank; empty where it says nothing."""
    field = _field_at(tuple(key for key in path if isinstance(key, str)), data)
    return f" {' '.join(field.description.split())}" if field and field.description else ""


def _explain(error: ValidationError, document: Document) -> list[str]:
    """Pydantic's complaints, for people: a line for each value, whatever its type may be."""
    by_path: dict[KeyPath, list[Any]] = {}
    for fault in error.errors():
        path = _path_in(fault["loc"], fault["type"], document.data)
        by_path.setdefault(path, []).append(fault)
    innermost = [
        path
        for path in by_path
        if not any(path == other[: len(path)] for other in by_path if other != path and path)
    ]
    return [_explain_one(path, by_path[path], document) for path in innermost]


def _explain_one(path: KeyPath, faults: Sequence[Any], document: Document) -> str:
    fault, dotted = faults[0], ".".join(map(str, path)) or "recipe"
    given = written(fault["input"])
    match fault["type"]:
        case "extra_forbidden":
            message = _unknown(path, document.data)
        case "missing":
            message = f"{dotted}: missing.{_about(path, document.data)}"
        case "union_tag_not_found":
            message = f"{dotted}.variant: missing. Known: {', '.join(variants.names())}."
        case "union_tag_invalid":
            path, name = (*path, "variant"), str(fault["input"]["variant"])
            message = f"{dotted}.variant: {no_such('variant', name, variants.names())}"
        case "value_error":
            message = f"{dotted}: {str(fault['ctx']['error']).rstrip('.')}."
        case "literal_error":
            known = re.findall(r"'([^']*)'", fault["ctx"]["expected"])
            near = nearest(str(fault["input"]), known)
            message = f"{dotted}: {given}: expected {fault['ctx']['expected']}.{near}"
        case _:
            message = (
                f"{dotted}: {given}: expected {expected(faults, _about(path, document.data))}."
            )
    place = next(
        (document.places[path[:i]] for i in range(len(path), 0, -1) if path[:i] in document.places),
        "",
    )
    return f"{place}: {message}" if place else message


def _path_in(loc: Sequence[str | int], kind: str, data: Any) -> KeyPath:
    """`loc` without pydantic's own steps (a union's branch), which are not in the data."""
    path: list[str | int] = []
    for i, part in enumerate(loc):
        inside = isinstance(data, Mapping) and part in data
        item = isinstance(data, tuple) and isinstance(part, int) and part < len(data)
        if inside or item:
            path.append(part)
            data = data[part]
        elif kind == "missing" and i == len(loc) - 1 and isinstance(part, str):
            path.append(part)
    return tuple(path)

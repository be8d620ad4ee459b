"""A recipe as a file: read, overridden, its faults explained, dumped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lorakit import tasks, variants
from lorakit.errors import RecipeError, nearest, no_such, several
from lorakit.foreign_keys import BY_COMMAND, HERE
from lorakit.schema import expected
from lorakit.sections import (
    Recipe,
    field_at,
    fields,
    keys,
    path_of,
    section_at,
    takes_free_keys,
    variants_with,
)
from lorakit.yamltext import LONGEST, Document, parse, scalar, words, written
from lorakit.yamltext import Path as KeyPath
from lorakit.yamltext import dump as as_yaml


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads the recipe at `path`, with `key=value` and `~key` applied on top.

    Raises:
        RecipeError: the file is missing or no mapping, or keys or values are wrong: all of them
            are listed, with line, dotted key, what was expected and the nearest valid name.

    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)  # one more than is taken
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise RecipeError(f"{path}: cannot be read: {reason}.") from None
    document = parse(text, str(path))
    _choose_task(document, overrides)
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


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _choose_task(document: Document, overrides: Sequence[str]) -> None:
    """Applies what `per_task` says of the task that the recipe or an override names."""
    table = document.data.pop("per_task", {})
    named = document.data.get("task")
    task = named.get("name") if isinstance(named, Mapping) else None
    for override in overrides:
        task = override.removeprefix("task.name=") if override.startswith("task.name=") else task
    if not isinstance(table, Mapping) or not all(isinstance(v, Mapping) for v in table.values()):
        place = document.places["per_task",]
        document.faults.append(f"{place}: per_task: expected task names, each with dotted keys.")
        return
    for name in set(table) - set(tasks.names()):
        place = document.places["per_task", name]
        document.faults.append(f"{place}: per_task: {no_such('task', name, tasks.names())}")
    for dotted, value in table.get(str(task), {}).items():
        place = document.places["per_task", str(task), dotted]
        path = path_of(dotted, document.data)
        if field_at(path, document.data) is None and not takes_free_keys(path[:-1], document.data):
            document.faults.append(f"{place}: per_task.{task}: {_unknown(path, document.data)}")
        else:
            _write(path, value, place, document)


def _write(path: KeyPath, value: Any, place: str, document: Document) -> None:
    """Sets a key, and where it came from; what stood there or below it is gone."""
    section: dict[str, Any] = document.data
    for key in path[:-1]:
        if not isinstance(section.get(str(key)), dict):
            section[str(key)] = {}
        section = section[str(key)]
    for below in [known for known in document.places if known[: len(path)] == path]:
        del document.places[below]
    document.places[path] = place
    section[str(path[-1])] = value


def _unset(path: KeyPath, document: Document) -> None:
    """Takes a key out, so that its default holds."""
    section: Any = document.data
    for key in path[:-1]:
        section = section.get(key) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(str(path[-1]), None)
    for below in [known for known in document.places if known[: len(path)] == path]:
        del document.places[below]


def _apply(override: str, document: Document) -> None:
    """Writes one `a.b=c` or `~a.b` into the document, or a fault where it names nothing."""
    unset = override.startswith("~")
    dotted, equals, text = override.removeprefix("~").partition("=")
    path, place = path_of(dotted, document.data), f"override {override!r}"
    if bool(equals) == unset or not all(path):
        document.faults.append(f"{place}: write key=value, or ~key for the default.")
        return
    if path[0] == "per_task":
        document.faults.append(f"{place}: per_task belongs into a recipe; set the key itself.")
        return
    section = section_at(path[:-1], document.data)
    field = fields(section).get(path[-1]) if section else None
    left = unset and dotted in keys()  # of a variant that another override has put away
    if field is None and not left and not takes_free_keys(path[:-1], document.data):
        document.faults.append(f"{place}: {_unknown(path, document.data)}")
        return
    if unset:
        _unset(path, document)
    else:
        _write(path, scalar(text) if field is None else _typed(text, field), place, document)


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
    while len(path) > 1 and field_at(path[:-1], data) is None:
        path = path[:-1]  # the first that is wrong
    name, dotted = str(path[-1]), ".".join(map(str, path))
    section = section_at(path[:-1], data)
    here = list(fields(section)) if section else []
    elsewhere = [key for key in keys() if key.rpartition(".")[2] == name]
    if name in BY_COMMAND:
        hint = f" `{name}` is {BY_COMMAND[name]} here."
    elif name in HERE:
        hint = f" `{name}` is `{HERE[name]}` here."
    elif dotted in elsewhere:
        hint = f" It belongs to the variant {' or '.join(variants_with(name))}."
    elif hint := nearest(name, here, close=0.9):
        pass
    elif elsewhere:
        hint = f" Is it {' or '.join(f'`{key}`' for key in elsewhere)}?"
    elif not (hint := nearest(name, here)):
        hint = f" Known here: {', '.join(here)}." if here else ""
    return f"{dotted}: no such key.{hint}"


def _about(path: KeyPath, data: Any) -> str:
    """What the recipe's reference says of a key, after a blank; empty where it says nothing."""
    field = field_at(tuple(key for key in path if isinstance(key, str)), data)
    return f" {' '.join(field.description.split())}" if field and field.description else ""


def _explain(error: ValidationError, document: Document) -> list[str]:
    """Pydantic's complaints, for people: a line for each value, whatever its type may be."""
    by_path: dict[KeyPath, list[Any]] = {}
    for fault in error.errors():
        path = _path_in(fault["loc"], document.data)
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
            why = str(fault["ctx"]["error"]).rstrip(".")
            plain = path in document.places and not isinstance(fault["input"], Mapping)
            value = f"{given}: " if plain and given not in why else ""
            message = f"{dotted}: {value}{why}."
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


def _path_in(loc: Sequence[str | int], data: Any) -> KeyPath:
    """`loc` without pydantic's own steps (a union's branch), which are no keys."""
    path: list[str | int] = []
    whole = data
    for i, part in enumerate(loc):
        inside = isinstance(data, Mapping) and part in data
        item = isinstance(data, tuple) and isinstance(part, int) and part < len(data)
        if inside or item:
            path.append(part)
            data = data[part]
        elif i == len(loc) - 1 and field_at((*path, part), whole):
            path.append(part)  # left out, where it must be given or its default does not fit
    return tuple(path)

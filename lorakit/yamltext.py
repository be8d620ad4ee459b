"""YAML as people write it: with the line of every key, no key twice, and `1e-3` a number."""

import re
from typing import Any, NamedTuple

import yaml

from lorakit.errors import RecipeError

Path = tuple[str | int, ...]


class Document(NamedTuple):
    """A mapping, the place of each of its keys, and what is wrong with it already."""

    data: dict[str, Any]  # lists as tuples
    places: dict[Path, str]  # ("train", "lr") -> "line 12"
    faults: list[str]


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1, with YAML 1.2's numbers: PyYAML reads `1e-3` as a word."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse(text: str, name: str) -> Document:
    """Reads one document.

    Raises:
        RecipeError: `text` is not YAML, or not a mapping.

    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            what = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}
            given = "empty" if node is None else what[type(node)]
            raise RecipeError(f"{name}: a recipe is a mapping of keys to values; this is {given}.")
        document = Document({}, {}, [])
        document.data.update(_mapping(loader, node, (), document))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{name}{line}: not YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: not YAML: {error}.") from None
    finally:
        loader.dispose()
    return document


def scalar(text: str) -> Any:
    """The value of one YAML expression, as in a recipe; `text` itself where it is none."""
    try:
        document = parse(f"value: {text}", "override")
    except RecipeError:
        return text
    return document.data["value"]


def _value(loader: _Loader, node: yaml.Node, path: Path, into: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, into)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(loader, item, (*path, i), into) for i, item in enumerate(node.value))
    return loader.construct_object(node)


def _mapping(loader: _Loader, node: yaml.MappingNode, path: Path, into: Document) -> dict[str, Any]:
    loader.flatten_mapping(node)  # resolves `<<`
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, place = str(key_node.value), f"line {key_node.start_mark.line + 1}"
        here = (*path, key)
        if key in found:
            dotted = ".".join(map(str, here))
            into.faults.append(f"{place}: {dotted}: given twice; first at {into.places[here]}.")
        into.places[here] = place
        found[key] = _value(loader, value_node, here, into)
    return found

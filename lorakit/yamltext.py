"""YAML as people write it: with the line of every key, no key twice, and `1e-3` a number."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from lorakit.errors import RecipeError

Path = tuple[str | int, ...]

LONGEST = 2**18
"""Characters of a text. Recipes have some thousands; PyYAML takes a second for a million."""
MOST = 10_000
"""Values of a document, those that an alias repeats counted each time: ten aliases of ten aliases,
nine deep, would be a billion ("billion laughs")."""
DEEPEST = 50
"""Levels of a document. Recipes have four."""
LONGEST_NUMBER = 100
"""Characters of a value that may be more than a word: 1:1:1:… is a number to YAML, one that takes
seconds to work out."""


class Document(NamedTuple):
    """A mapping, the place of each of its keys, and what is wrong with it already."""

    data: dict[str, Any]  # lists as tuples
    places: dict[Path, str]  # ("train", "lr") -> "line 12"
    faults: list[str]


class _Limited(yaml.scanner.Scanner, yaml.composer.Composer):
    """Stops within a document that is too deep or too long, not behind it: each bracket that is
    open costs time with every word that follows.
    """

    depth = values = 0

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        """Raises RecursionError below the deepest level: of brackets that are read ahead, too."""
        if self.flow_level >= DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Raises RecursionError below the deepest level, MarkedYAMLError behind the last value."""
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > DEEPEST:
            raise RecursionError
        if self.values > 2 * MOST:  # keys are nodes as well
            mark = self.peek_event().start_mark  # type: ignore[attr-defined]  # a parser's
            raise yaml.MarkedYAMLError(problem=f"more than {MOST:,} values", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Loader(_Limited, yaml.SafeLoader):
    """Safe YAML 1.1, with YAML 1.2's numbers: PyYAML reads `1e-3` as a word."""


class _Words(_Limited, yaml.BaseLoader):
    """Every value is the word it is written with."""


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would take for numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def parse(text: str, name: str) -> Document:
    """Reads one document.

    Raises:
        RecipeError: `text` is not YAML, not a mapping, or larger than any recipe.

    """
    if len(text) > LONGEST:
        raise RecipeError(f"{name}: longer than {LONGEST:,} characters; that is no recipe.")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            what = {yaml.SequenceNode: "a list", yaml.ScalarNode: "a single value"}
            given = "empty" if node is None else what[type(node)]
            raise RecipeError(f"{name}: a recipe is a mapping of keys to values; this is {given}.")
        if (values := _values(node, {})) > MOST:
            raise RecipeError(
                f"{name}: {values:,} values, aliases written out; a recipe has at most {MOST:,}."
            )
        document = Document({}, {}, list(_key_faults(node, (), set())))
        document.data.update(_mapping(loader, node, (), document))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        tab = " Indent by blanks, not tabs." if "'\\t'" in problem else ""
        raise RecipeError(f"{name}{line}: not YAML: {problem}.{tab}") from None
    except yaml.reader.ReaderError as error:
        line = f", line {text.count(chr(10), 0, error.position) + 1}"
        raise RecipeError(f"{name}{line}: not YAML: {error.reason}.") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested deeper than {DEEPEST} levels.") from None
    finally:
        if loader is not None:
            loader.dispose()
    return document


def scalar(text: str) -> Any:
    """The value of one YAML expression, as in a recipe; `text` itself where it is none."""
    try:
        document = parse(f"value: {text}", "override")
    except RecipeError:
        return text
    return document.data["value"]


def words(text: str) -> Any:
    """As `scalar`, with every number and `true` within it left as the word it is written with."""
    try:
        node = yaml.compose(text, _Words)
    except (yaml.YAMLError, RecursionError):
        return text
    return _words(node) if isinstance(node, yaml.SequenceNode) else text


def dump(data: Mapping[str, Any]) -> str:
    """A mapping as YAML that `parse` reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def written(value: Any) -> str:
    """A value as YAML, on one line and not too long of it, for messages; words in quotes."""
    if isinstance(value, str):
        text = repr(value)
    else:
        text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000)
    text = text.removesuffix("...\n").strip()
    return text if len(text) <= 80 else f"{text[:79]}…"


def _words(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return tuple(_words(item) for item in node.value)
    return node.value


def _value(loader: _Loader, node: yaml.Node, path: Path, into: Document) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(loader, node, path, into)
    if isinstance(node, yaml.SequenceNode):
        return tuple(_value(loader, item, (*path, i), into) for i, item in enumerate(node.value))
    if len(node.value) > LONGEST_NUMBER:
        return str(node.value)
    try:
        return loader.construct_object(node)
    except ValueError:  # looks like a date or a number and is none, such as 2024-13-45
        return str(node.value)


def _mapping(loader: _Loader, node: yaml.MappingNode, path: Path, into: Document) -> dict[str, Any]:
    loader.flatten_mapping(node)  # resolves `<<`; what it brings stands before the mapping's own
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            key = str(key_node.value)
            into.places[*path, key] = _line(key_node)
            found[key] = _value(loader, value_node, (*path, key), into)
    return found


def _values(node: yaml.Node, known: dict[int, int], depth: int = 1) -> int:
    """Nodes in and below `node`, aliases written out; every node is visited once.

    Raises:
        RecursionError: too deep, or an alias inside its own anchor.

    """
    if depth > DEEPEST:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = -1  # under way
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = (n for part in below for n in (part if isinstance(part, tuple) else (part,)))
        known[id(node)] = 1 + sum(_values(n, known, depth + 1) for n in nodes)
    if known[id(node)] < 0:
        raise RecursionError
    return known[id(node)]


def _key_faults(node: yaml.Node, path: Path, seen: set[int]) -> Iterator[str]:
    """Keys given twice in one mapping, and keys that are no words, in `node` and below it.

    Looked for before `<<` is resolved: a key beside a merge may repeat one of the merged.
    """
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _key_faults(item, (*path, i), seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, str] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            yield f"{_line(key_node)}: {_dotted(path)}: a key is one word, no list and no mapping."
            continue
        key, line = str(key_node.value), _line(key_node)
        if key in first and key != "<<":
            yield f"{line}: {_dotted((*path, key))}: given twice; first at {first[key]}."
        first.setdefault(key, line)
        yield from _key_faults(value_node, (*path, key), seen)


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "recipe"

"""Writes docs/recipe.md, the reference of all keys, from the JSON schema.

.venv/bin/python scripts/recipe_reference.py
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit import foreign_keys, recipe

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"

INTRODUCTION = """\
<!-- Written by scripts/recipe_reference.py from the schema; a test compares. Change the docstrings
     of the sections in lorakit/, then run it again. -->

# Recipe reference

A recipe is one YAML file. Keys that do not exist are refused, with the line and the nearest key
that does; so are values of another type: `true` is no number, and a number is no text. `1e-3` is a
number. A key without a default below must be given. Relative paths start at the folder that the
command is typed in.

A recipe's first line can name the schema, by which editors complete keys and underline faults:

```yaml
# yaml-language-server: $schema=recipe.schema.json
```

`lorakit schema > recipe.schema.json` writes it. `lorakit train RECIPE --dry-run` checks a recipe
against its rows and its model and prints it with every default filled in.

On the command line `train.lr=3e-4` sets a key and `'~train.lr'` puts it back to its default
(quoted, since some shells read `~` themselves). An override is split at its first `=`; its value is
read as in the file.
"""
FOREIGN = """\
## What other tools call these

None of these names is accepted; each is answered with the key it has here.

| elsewhere | here |
| --- | --- |
"""

Schema = Mapping[str, Any]


def page() -> str:
    """The whole page."""
    schema = recipe.json_schema()
    sections = [INTRODUCTION, *_sections(schema), FOREIGN + _foreign()]
    return "\n".join(sections) + "\n"


def _sections(schema: Schema) -> Iterator[str]:
    """Text of every section, the top level first, in the order of a recipe."""
    sections = schema["$defs"]
    own, below = _split(schema["properties"], sections)
    yield "## Top level\n\n" + _table("", own, schema["required"])
    for name, section, _ in below:
        if "oneOf" not in schema["properties"][name]:
            yield from _section(name, section, sections)
            continue
        variants = {
            variant: sections[_name_of(ref)]
            for variant, ref in schema["properties"][name]["discriminator"]["mapping"].items()
        }
        yield from _variants(name, variants, sections)


def _variants(name: str, variants: Mapping[str, Schema], sections: Schema) -> Iterator[str]:
    """What all variants have, then what each has of its own."""
    first, *others = (variant["properties"] for variant in variants.values())
    common = {
        key: spec for key, spec in first.items() if all(other.get(key) == spec for other in others)
    }
    choice = {"enum": list(variants), "description": "The method."}
    yield f"## `{name}`\n\n" + _table(f"{name}.", {"variant": choice, **common}, ["variant"])
    for variant, section in variants.items():
        own = {k: v for k, v in section["properties"].items() if k not in {*common, "variant"}}
        only = {**section, "properties": own}
        yield from _section(name, only, sections, f"### `{name}` with `variant: {variant}`")


def _section(
    name: str, section: Schema, sections: Schema, title: str | None = None
) -> Iterator[str]:
    own, below = _split(section["properties"], sections)
    text = f"{title or f'## `{name}`'}\n\n{_line(section['description'])}\n"
    required = section.get("required", ())
    yield text + ("\n" + _table(f"{name}.", own, required) if own else "")
    for key, inner, _ in below:
        yield from _section(f"{name}.{key}", inner, sections, f"### `{name}.{key}`")


def _split(
    properties: Schema, sections: Schema
) -> tuple[dict[str, Any], list[tuple[str, Schema, Schema]]]:
    """Keys that hold values, and keys that hold sections."""
    own, below = {}, []
    for key, spec in properties.items():
        options = [spec, *spec.get("anyOf", ()), *spec.get("oneOf", ())]
        inside = [sections[_name_of(o["$ref"])] for o in options if "$ref" in o]
        if inside:
            below.append((key, inside[0], spec))
        else:
            own[key] = spec
    return own, below


def _table(prefix: str, properties: Schema, required: Sequence[str]) -> str:
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, spec in properties.items():
        default = "" if key in required else f"`{_plain(spec.get('default', {}))}`"
        meaning = _line(spec.get("description", ""))
        cells = (f"`{prefix}{key}`", _kind(spec), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _kind(spec: Schema) -> str:
    """`number above 0`, `list of text`, …"""
    if "anyOf" in spec:
        kinds = [_kind(option) for option in spec["anyOf"]]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in spec or "enum" in spec:
        return ", ".join(f"`{value}`" for value in spec.get("enum", [spec.get("const")]))
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "`true`, `false`",
        "null": "`null`",
        "object": "mapping",
        "array": "list",
    }
    kind = words[spec["type"]]
    if spec["type"] == "array":
        items = spec.get("items") or spec["prefixItems"][0]
        count = f"{spec['minItems']} of " if "prefixItems" in spec else ""
        return f"list of {count}{_kind(items)}"
    if spec["type"] == "object" and isinstance(spec.get("additionalProperties"), dict):
        return f"mapping of names to {_kind(spec['additionalProperties'])}"
    limits = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "exclusiveMaximum": "below",
        "maximum": "up to",
    }
    return " ".join([kind, *(f"{word} {spec[k]:g}" for k, word in limits.items() if k in spec)])


def _plain(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _line(text: str) -> str:
    """A docstring in one line."""
    return " ".join(text.split())


def _name_of(reference: str) -> str:
    return reference.rpartition("/")[2]


def _foreign() -> str:
    names = defaultdict(list)
    for name, here in foreign_keys.HERE.items():
        names[here].append(f"`{name}`")
    rows = [f"| {', '.join(elsewhere)} | `{here}` |" for here, elsewhere in names.items()]
    rows += [f"| `{name}` | {here} |" for name, here in foreign_keys.BY_COMMAND.items()]
    return "\n".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

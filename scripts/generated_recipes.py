"""Recipes by the thousand, drawn from the sections themselves: from types, bounds and choices.

    python scripts/generated_recipes.py [--loads 20000] [--dry-runs 300] [--seed 0]

A new key is drawn as soon as it is there; a type that is not known here yet fails loudly. Of what
is drawn it is held true that

- a recipe whose every value is of its type and within its bounds is read, or refused for what two
  settings say of each other, and then the key that is blamed can be taken out, until it is read;
- what is read comes back from its dump as it was;
- with an unknown key, a value of no type of its field, a required key missing or one given twice
  it is refused, and the message names the key;
- what is read is dry-run, over a tiny model and a few rows, to its end or to a message.

tests/test_generated_recipes.py holds some hundred of them to that in every test run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import astuple, dataclass
from io import StringIO
from math import isfinite
from pathlib import Path
from time import perf_counter
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

os.environ["HF_HUB_OFFLINE"] = "1"

from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from lorakit import recipe as recipes
from lorakit.adapter import VariantConfig
from lorakit.cli import main as lorakit
from lorakit.data import DataSection
from lorakit.errors import RecipeError
from lorakit.schema import Section
from lorakit.sections import Recipe, fields, path_of, section_at
from lorakit.tasks import OWN, glue
from lorakit.yamltext import dump, parse

Data = dict[str, Any]
Drawn = SearchStrategy[Any]
Key = tuple[str, ...]

TASKS = (*glue.NAMES, *OWN)
"""Those that can be trained."""
LINES = re.compile(r"^(?:\s*line \d+: )?([\w.\-]+): ")
"""A fault's dotted key."""


@dataclass(frozen=True)
class World:
    """What free text and large numbers may be."""

    text: Drawn
    largest: int | None
    """Of numbers without an upper bound; None: any."""
    pinned: Mapping[Key, Drawn]
    """What certain keys may be, whatever their type says."""


ANY = World(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    largest=None,
    pinned={("task", "name"): st.sampled_from(TASKS), ("per_task",): st.just({})},
)
"""Where recipes are only read."""


def value(kind: Any, limits: Sequence[Any], world: World, path: Key) -> Drawn:
    """Values of the type `kind` that keep to its `limits`.

    Raises:
        TypeError: the type is not known here.

    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return value(inner[0], [*inner[1:], *limits], world, path)
    if origin in (Union, UnionType):
        return st.one_of([value(one, limits, world, path) for one in inner])
    if origin is Literal:
        return st.sampled_from(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        one = value(inner[0], (), world, path)
        return st.lists(one, max_size=0 if one.is_empty else 3)
    if origin is tuple:
        return st.tuples(*(value(one, (), world, path) for one in inner)).map(list)
    if origin is dict:
        most = 0 if world.text.is_empty else 2
        return st.dictionaries(world.text, value(inner[1], (), world, path), max_size=most)
    if isinstance(kind, type) and issubclass(kind, Section):
        return section(kind, world, path)
    plain: dict[Any, Callable[[], Drawn]] = {
        NoneType: st.none,
        bool: st.booleans,
        int: lambda: integer(limits, world),
        float: lambda: fraction(limits, world),
        str: lambda: text(limits, world),
    }
    if kind not in plain:
        raise TypeError(f"{'.'.join(path)}: no values for {kind}; teach scripts/generated_recipes")
    return plain[kind]()


def section(kind: type[Section], world: World, path: Key = ()) -> Drawn:
    """Mappings of a section's keys: those that are required, and any of the others."""
    drawn = {}
    for name, field in fields(kind).items():
        here = (*path, name)
        pin = world.pinned.get(here)
        drawn[name] = value(field.rebuild_annotation(), (), world, here) if pin is None else pin
    required = {name: drawn[name] for name, field in fields(kind).items() if field.is_required()}
    others = {n: d for n, d in drawn.items() if n not in required and not d.is_empty}
    return st.fixed_dictionaries(required, optional=others)


def bound(limits: Sequence[Any], kind: type) -> Any:
    """The limit of that kind among those of an annotation, and of fields within it; else None."""
    flat = [one for limit in limits for one in getattr(limit, "metadata", [limit])]
    return next((astuple(one)[0] for one in flat if type(one) is kind), None)


def integer(limits: Sequence[Any], world: World) -> Drawn:
    """Whole numbers."""
    least, above = bound(limits, Ge), bound(limits, Gt)
    return st.integers(above + 1 if least is None else least, bound(limits, Le) or world.largest)


def fraction(limits: Sequence[Any], world: World) -> Drawn:
    """Finite numbers."""
    above, below = bound(limits, Gt), bound(limits, Lt)
    return st.floats(
        bound(limits, Ge) if above is None else above,
        (bound(limits, Le) or world.largest) if below is None else below,
        exclude_min=above is not None,
        exclude_max=below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


def text(limits: Sequence[Any], world: World) -> Drawn:
    """Text of a pattern, or any."""
    flat = [one for limit in limits for one in getattr(limit, "metadata", [limit])]
    pattern = next((one.pattern for one in flat if getattr(one, "pattern", None)), None)
    if pattern is not None:
        return st.from_regex(re.sub(r"\$$", r"\\Z", pattern), fullmatch=True)
    least = bound(limits, MinLen) or 0
    return world.text.filter(lambda word: len(word) >= least)


def drawn(world: World) -> Drawn:
    """Recipes whose values are of their types; rows of one's own where the task has none."""
    whole, rows = section(Recipe, world), section(DataSection, world, ("data",))

    @st.composite
    def one(draw: Callable[[Drawn], Any]) -> Data:
        given: Data = draw(whole)
        if given["task"]["name"] in OWN:
            given["data"] = given.get("data") or draw(rows)
        elif given.get("data") is not None:
            del given["data"]
        return given

    return one()


# what holds


def refusal(path: Path, given: Data) -> str | None:
    """What is said of a recipe; None: it is read."""
    path.write_text(dump(given), encoding="utf-8")
    try:
        recipe = recipes.load(path)
    except RecipeError as error:
        return str(error)
    path.write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load(path) == recipe, "it does not come back from its dump"
    return None


def mended(path: Path, given: Data, told: Counter[str] | None = None) -> Data:
    """The recipe without the keys that others contradict: it is read."""
    while said := refusal(path, given):
        if told is not None:
            told["refused"] += 1
        kinds = {fault["type"] for fault in faults(given)}
        assert kinds == {"value_error"}, f"what is of its type is refused: {said}"
        blamed: set[Key] = set()
        for line in said.splitlines()[1:]:
            found = LINES.match(line)
            assert found, f"no key is blamed: {line}"
            blamed.add(standing(given, path_of(found[1], given)))
        for key in blamed:
            take_out(given, key)
    return given


def faults(given: Data) -> Sequence[Any]:
    """Pydantic's own complaints."""
    try:
        Recipe.model_validate(parse(dump(given), "").data)
    except ValidationError as error:
        return error.errors()
    return []


def standing(given: Data, path: Key) -> Key:
    """A key, or the nearest section around it that there is: what was left out may be blamed."""
    inside: Any = given
    for depth, key in enumerate(path):
        if not isinstance(inside, dict) or key not in inside:
            assert depth, "what is blamed is not there"
            return path[:depth]
        inside = inside[key]
    return path


def take_out(given: Data, path: Key) -> None:
    """Removes what stands at `path`, if it has not gone with a section around it."""
    inside: Any = given
    for key in path[:-1]:
        inside = inside.get(key, {})
    inside.pop(path[-1], None)


# mutations


WRONG: tuple[Any, ...] = (None, True, "two words", "", -1, 0, 0.5, 1, 10**30, 1e308, float("nan"))
WRONG += (float("inf"), [], ["x", 1], [[{}]], {}, {"a": {"b": []}}, {"": None})


@dataclass(frozen=True)
class Broken:
    """A recipe that cannot be read, as text, and the key that the message has to name."""

    text: str
    key: str


def mutations(given: Data, draw: random.Random) -> Iterator[Broken]:
    """One of each kind."""
    yield unknown(given, draw)
    yield wrong(given, draw)
    yield missing(given, draw)
    yield twice(given, draw)


def places(given: Data) -> list[tuple[Key, type[Section]]]:
    """All sections that the recipe has, and where."""
    found: list[tuple[Key, type[Section]]] = [((), Recipe)]
    for path, kind in found:
        inside = at(given, path)
        for key in fields(kind):
            below = section_at((*path, key), given)
            if below is not None and isinstance(inside.get(key), dict):
                found.append(((*path, key), below))
    return found


def at(given: Any, path: Key) -> Any:
    """What stands at `path`."""
    for step in path:
        given = given[step]
    return given


def changed(given: Data, path: Key, key: str, new: Any) -> str:
    """The recipe as text, with another value."""
    copy: Data = json.loads(json.dumps(given))
    at(copy, path)[key] = new
    return dump(copy)


def unknown(given: Data, draw: random.Random) -> Broken:
    """A key that no section has."""
    path, _ = draw.choice(places(given))
    name = draw.choice(("zzz", "lora_r", "lrr", "Rank", "variants"))
    return Broken(changed(given, path, name, 1), ".".join((*path, name)))


def wrong(given: Data, draw: random.Random) -> Broken:
    """A value that the field takes in no way."""
    while True:
        path, kind = draw.choice(places(given))
        key, field = draw.choice(list(fields(kind).items()))
        bad = [one for one in WRONG if not takes(field, one)]
        if bad and not field.exclude:
            return Broken(changed(given, path, key, draw.choice(bad)), ".".join((*path, key)))


def takes(field: FieldInfo, one: Any) -> bool:
    """Whether the field's own type takes a value, whatever the other settings are."""
    if isinstance(one, list):
        one = tuple(one)
    try:
        TypeAdapter(field.rebuild_annotation()).validate_python(one, strict=True)
    except ValidationError:
        return False
    return not isinstance(one, float) or isfinite(one)


def missing(given: Data, draw: random.Random) -> Broken:
    """Without a required key."""
    required = [
        (path, key)
        for path, kind in places(given)
        for key, field in fields(kind).items()
        if field.is_required() and kind is not VariantConfig
    ]
    path, key = draw.choice(required)
    copy: Data = json.loads(json.dumps(given))
    del at(copy, path)[key]
    return Broken(dump(copy), ".".join((*path, key)))


def twice(given: Data, draw: random.Random) -> Broken:
    """With a section given again."""
    key = draw.choice(list(given))
    return Broken(dump(given) + dump({key: given[key]}), key)


def refused(path: Path, broken: Broken) -> str:
    """What is said of a recipe that cannot be read; it names the key."""
    path.write_text(broken.text, encoding="utf-8")
    try:
        recipes.load(path)
    except RecipeError as error:
        said = str(error)
        assert broken.key in said, f"{broken.key} is not named: {said}"
        return said
    raise AssertionError(f"{broken.key} is wrong, and the recipe is read:\n{broken.text}")


# dry runs


ROWS = {
    "classification": ("rows.csv", "text,label", "a {word} film number {i},{word}"),
    "multi-label": ("rows.csv", "text,label", "a {word} film number {i},{word}"),
    "regression": ("numbers.csv", "text,label", "a {word} film number {i},{i}"),
    "token-classification": (
        "words.jsonl",
        "",
        '{{"tokens": ["a", "{word}", "film", "{i}"], "label": ["O", "{word}", "O", "O"]}}',
    ),
}
"""A file of every task that the tiny model can be taught: its name, first line and rows."""
NAMES_A_KEY = re.compile(r"\b(model|task|data|adapter|train)(\.\w|: )")


def there(base: Path) -> World:
    """Where recipes are dry-run: what they name is there, or not named, and numbers are small."""
    return World(
        text=st.nothing(),
        largest=8,
        pinned={
            ("model", "name"): st.just(str(base)),
            ("task", "name"): st.sampled_from(list(ROWS)),
            ("data", "train"): st.just("x.csv"),
            ("output_dir",): st.just("runs/new"),
            ("per_task",): st.just({}),
            ("task", "max_length"): st.integers(4, 32),
            ("adapter", "targets"): st.sampled_from(["all-linear", ["query", "value"]]),
            ("adapter", "layers"): st.sampled_from([None, "0", "0-1"]),
        },
    )


def write_rows(folder: Path) -> None:
    """The files of `ROWS`."""
    for name, first, row in ROWS.values():
        rows = [row.format(word=word, i=i) for i in range(20) for word in ("warm", "dull")]
        (folder / name).write_text("\n".join(filter(None, [first, *rows])) + "\n")


def dry_run(folder: Path, given: Data) -> int:
    """Types `lorakit train --dry-run`; its exit code, 0 or that of a message that names a key."""
    given["adapter"].setdefault("rank", 2)  # these defaults are larger than the model
    given["task"].setdefault("max_length", 32)
    given["data"]["train"] = str(folder / ROWS[given["task"]["name"]][0])
    path = folder / "recipe.yaml"
    path.write_text(dump(mended(path, given)), encoding="utf-8")
    code, out, err = 0, StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            lorakit(["train", str(path), "--dry-run"])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    assert code in (0, 2), f"exit code {code}: {err.getvalue()}"
    if code:
        first, *more = err.getvalue().splitlines()
        assert first.startswith("error: "), err.getvalue()
        assert NAMES_A_KEY.search(err.getvalue()), f"no key is named: {err.getvalue()}"
        assert all(line.startswith("  ") for line in more), err.getvalue()
    return code


# by the thousand


def by_the(
    count: int, number: int, strategy: Drawn, hold: Callable[[Any], None], report: Counter[str]
) -> None:
    """Has `hold` look at `count` examples."""
    if not count:
        return
    quiet = settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )

    def each(example: Any) -> None:
        report["drawn"] += 1
        hold(example)

    seed(number)(quiet(given(strategy)(each)))()


def main() -> None:
    """Loads and dry-runs as many as asked for, and counts them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=20_000)
    parser.add_argument("--dry-runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    started, told = perf_counter(), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        path, draws = Path(name) / "recipe.yaml", random.Random(wanted.seed)
        write_rows(path.parent)

        def hold(example: Data) -> None:
            read = mended(path, example, told)
            told["read"] += 1
            for broken in mutations(read, draws):
                refused(path, broken)
                told["broken, refused"] += 1

        while told["read"] + told["refused"] + told["broken, refused"] < wanted.loads:
            by_the(500, draws.randrange(2**32), drawn(ANY), hold, told)
            print(dict(told), file=sys.stderr)

        def run(example: Data) -> None:
            told[f"dry runs that ended in {dry_run(path.parent, example)}"] += 1

        base = Path(__file__).parents[1] / "tests" / "data" / "base"
        by_the(wanted.dry_runs, wanted.seed, drawn(there(base)), run, told)
    for what, count in told.items():
        print(f"{what}: {count:,}")
    print(f"no finding, {perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

"""Broken files get a message: some hundred of those that scripts/fuzz.py feeds by the thousand."""

import json
import random
import runpy
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorakit import checkpoint, manifest, packed, peft_format
from lorakit import recipe as recipes
from lorakit.data.sources import records
from lorakit.errors import DataError, FolderError, LorakitError, RecipeError
from lorakit.peft_config import Patterns
from lorakit.sections import Recipe

ROOT = Path(__file__).parents[1]
FUZZ = runpy.run_path(str(ROOT / "scripts" / "fuzz.py"))
EACH = 25
"""Inputs for each reader."""


@pytest.fixture(autouse=True)
def _alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGVTALRM, FUZZ["out_of_time"])
    yield
    signal.signal(signal.SIGVTALRM, before)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Of this process's own time."""
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    except FUZZ["TooSlowError"]:
        pytest.fail(f"takes longer than {seconds:g} s", pytrace=False)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def names() -> list[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return [target.name for target in FUZZ["targets"](Path(folder))]


@pytest.mark.parametrize("name", names())
def test_a_broken_file_is_refused_in_words_within_a_second(tmp_path: Path, name: str) -> None:
    target = next(found for found in FUZZ["targets"](tmp_path) if found.name == name)
    told: Counter[str] = Counter()
    findings = list(FUZZ["search"](target, range(EACH), 0, told))
    assert findings == []
    assert told["taken"] + told["refused"] == EACH


def texts(rows: Any) -> list[str]:
    return [row.cells["text"] for row in rows]


def ranks(adapter: Any) -> dict[str, int]:
    return {name: pair.rank for name, pair in adapter.pairs.items()}


PAIRS = {name: pair.rank for name, pair in FUZZ["plain_adapter"]().pairs.items()}
CODES = {name: pair.rank for name, pair in FUZZ["coded_adapter"]().pairs.items()}
FIRST = ["warm", "dull"]
READ: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "recipe": (lambda recipe: isinstance(recipe, Recipe), True),
    "override": (lambda recipe: recipe.model.name.startswith("package:"), True),
    "adapter_config.json": (ranks, PAIRS),
    "adapter_model.safetensors": (ranks, PAIRS),
    "packed.json": (ranks, CODES),
    "packed.safetensors": (ranks, CODES),
    "state.json": (lambda meta: list(meta.labels), ["bad", "good"]),
    "lorakit.json": (lambda card: (card.labels, card.bytes), (["bad", "good"], (100, 50))),
    "manifest.json": (lambda nothing: nothing, None),
    "finished/lorakit-manifest.json": (lambda nothing: nothing, None),
    "finished/adapter_config.json": (lambda nothing: nothing, None),
    "finished/recipe.yaml": (lambda nothing: nothing, None),
    "rows.csv": (texts, ["a film, warm", "dull", "two\nlines"]),
    "rows.tsv": (texts, ['a "quote"', "dull"]),
    "rows.jsonl": (texts, FIRST),
    "rows.json": (texts, FIRST),
    "rows.parquet": (texts, FIRST),
    "rows.txt": (texts, ["a first line", "a second one"]),
    "SST-2/dev.tsv": (lambda splits: len(splits.rows["validation"].texts), 2),
    "MRPC/dev.tsv": (lambda splits: splits.rows["validation"].texts[1], ("one", "six")),
}
"""What each reader makes of its sound file, and what that is."""


@pytest.mark.parametrize("name", names())
def test_what_is_not_broken_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    """Else the test above would pass with readers that refuse everything."""
    target = next(found for found in FUZZ["targets"](tmp_path) if found.name == name)
    made, expected = READ[name]
    for seed in target.seeds:
        assert made(target.feed(seed)) == expected


def test_the_search_sees_what_it_looks_for(tmp_path: Path) -> None:
    def broken(data: bytes) -> None:
        raise [IndexError, LorakitError, FUZZ["TooSlowError"], RecursionError][len(data) % 4]("x")

    target = FUZZ["Target"]("broken", (b"x" * 40,), FUZZ["bytewise"], broken)
    found = {finding.what for finding in FUZZ["search"](target, range(80), 0)}
    assert found == {"IndexError: x", "TooSlowError: x", "RecursionError: x"}


def test_the_same_number_makes_the_same_input() -> None:
    target = FUZZ["Target"]("t", (b"a: 1\n",), FUZZ["bytewise"], lambda _: 1 / 0)
    first, again = (list(FUZZ["search"](target, range(5), 3)) for _ in range(2))
    assert [finding.input for finding in first] == [finding.input for finding in again]


# what it has found


BRACKETS = "[" * 3000


@pytest.mark.parametrize("text", [f"train={{{BRACKETS}", f"train.lr={BRACKETS}"])
def test_an_override_of_open_brackets_does_not_hold_the_reader_up(text: str) -> None:
    with within(2.0), pytest.raises(RecipeError, match="override"):
        recipes.load(ROOT / "recipes" / "quickstart.yaml", [text])


def test_numbers_of_yaml_that_are_worked_out_for_seconds_are_words(tmp_path: Path) -> None:
    """1:30 is 90 to YAML 1.1, and each further pair of digits a product more."""
    path = tmp_path / "r.yaml"
    path.write_text(f"seed: 1{':1' * 50_000}\n")
    with within(2.0), pytest.raises(RecipeError, match="seed: '1:1:1"):
        recipes.load(path)


def test_a_parquet_file_of_types_that_its_reader_does_not_know(tmp_path: Path) -> None:
    target = next(t for t in FUZZ["targets"](tmp_path) if t.name == "rows.parquet")
    (seed,) = target.seeds
    draws = (random.Random(f"0 rows.parquet {number}") for number in (31, 557))
    for draw in draws:
        draw.choice(target.seeds)
        (tmp_path / "x.parquet").write_bytes(target.change(seed, draw))
        with pytest.raises(DataError, match=r"x\.parquet"):
            list(records(str(tmp_path / "x.parquet"), "data.train"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("start", ['{"text": "a", "label": "b", "x": ', '{"data": '])
def test_rows_that_are_nested_deeper_than_python_reads(
    tmp_path: Path, name: str, start: str
) -> None:
    (tmp_path / name).write_text(start + "[" * 5000 + "]" * 5000 + "}")
    with pytest.raises(DataError, match="nested too deep"):
        list(records(str(tmp_path / name), "data.train"))


def test_a_manifest_that_is_nested_deeper_than_python_reads(tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text("[" * 5000 + "]" * 5000)
    with pytest.raises(FolderError, match=r"manifest\.json: cannot be read"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("labels", None), ("plans", {"a": [1]}), ("plans", []), ("head", 1), ("scores", {"f1": "x"})],
)
def test_a_checkpoint_s_state_of_other_types(tmp_path: Path, key: str, value: Any) -> None:
    (tmp_path / "state.json").write_text(json.dumps({**FUZZ["STATE"], key: value}))
    with pytest.raises(FolderError, match=rf"state\.json cannot be read: 1 fault\n  {key}"):
        checkpoint.meta(tmp_path)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64, torch.int8])
def test_an_adapter_of_numbers_of_another_kind(tmp_path: Path, kind: torch.dtype) -> None:
    peft_format.write(tmp_path, FUZZ["plain_adapter"]())
    path = tmp_path / "adapter_model.safetensors"
    tensors = dict.fromkeys(("a.lora_A.weight", "a.lora_B.weight"), torch.ones(1, 1).to(kind))
    save_file({key: value.clone() for key, value in tensors.items()}, path)
    if kind.is_floating_point:
        with pytest.raises(FolderError, match=r"rank 1, .* says 3"):
            peft_format.read(tmp_path)
    else:
        with pytest.raises(FolderError, match=f"a.lora_A.weight: {kind}; expected fractions"):
            peft_format.read(tmp_path)


def test_a_packed_shape_that_no_tensor_has(tmp_path: Path) -> None:
    packed.write(tmp_path, FUZZ["coded_adapter"]())
    header = json.loads((tmp_path / packed.HEADER).read_text())
    header["layers"]["encoder.value"]["A"]["shape"] = [0, 2**70]
    (tmp_path / packed.HEADER).write_text(json.dumps(header))
    with pytest.raises(FolderError, match=r"encoder\.value\.A\.shape\.1: .*less than"):
        packed.read(tmp_path)


def test_a_pattern_that_would_match_for_years_is_given_up(tmp_path: Path) -> None:
    alphas = Patterns(tmp_path, "alpha_pattern", {"(a|aa)+b": 1.0}, 8.0)
    with pytest.raises(FolderError, match="alpha_pattern: matching takes longer than 1 s"):
        alphas.of("a" * 200)


def test_hundreds_of_names_over_hundreds_of_modules_take_no_time(tmp_path: Path) -> None:
    given = {f"model.layers.{i}.mlp.{k}_proj": i for i in range(300) for k in ("up", "down")}
    ranks = Patterns(tmp_path, "rank_pattern", given, 8)
    with within(1.0):
        assert [ranks.of(f"base.{name}") for name in given] == list(given.values())

"""Feeds broken files to everything that reads one, and sees that a user would get a message.

    python scripts/fuzz.py [--inputs 100000] [--seed 0] [--only WORD]

Valid files are changed: bits and bytes; and, where a file has a structure, its keys and values,
so that what is behind the parser is reached as well. A reader may take an input or raise a
LorakitError with a text of its own; anything else, or more than a second of its own time, is a
finding. Each is printed with the target and the number that makes the same input again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch
import yaml
from safetensors.torch import load, save

from lorakit import checkpoint, manifest, packed, peft_format, seal, trained
from lorakit import recipe as recipes
from lorakit.adapter import Factors
from lorakit.codes import Coded, CodedPair, Grid, Grids
from lorakit.data.sources import records
from lorakit.errors import LorakitError
from lorakit.packed import PackedAdapter
from lorakit.peft_format import PeftAdapter
from lorakit.tasks import glue

ROOT = Path(__file__).parents[1]
LIMIT = 1.0
"""Seconds of its own that a reader may take for one input."""
BYTES = (b"\0", b"\xff", b"\n", b"\r", b"\t", b'"', b"'", b"{", b"[", b"}", b":", b",", b"-", b"#")
BYTES += (b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"9" * 30, b"1e999", b"&a *a", b"<<: ")
BYTES += (b"[" * 3000, b'{"a":' * 3000, b"- " * 3000, b"(" * 3000)
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 10**400)
VALUES += (0.5, 1e308, 1e-320, float("nan"), float("inf"), "", " ", "x", "nan", "../../etc", "/")
VALUES += ("\0", "\x1b[2J", "\ud800", "(", "(a|aa)+b", "[", "*", "é" * 50, "9" * 5000, "~", "!!int")
VALUES += ([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [0] * 50, ["x"] * 50)
KEYS = ("", " ", "x", "r", "name", "0", "a.b", "__class__", "<<", "\n", "é", "lambda", "format")

Draw = random.Random
Change = Callable[[bytes, Draw], bytes]


@dataclass(frozen=True)
class Target:
    """One reader, valid inputs for it, and how they are changed."""

    name: str
    seeds: tuple[bytes, ...]
    change: Change
    feed: Callable[[bytes], object]
    """Gives the reader an input, as a file where it reads one."""


class TooSlowError(BaseException):
    """A reader has taken more than its time; no Exception, so that no reader catches it."""


# changes


def bytewise(data: bytes, draw: Draw) -> bytes:
    """One to four edits of bytes."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed) + 1)
        length = draw.choice((1, 1, 2, 8, 64))
        kind = draw.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at : at + length]
        elif kind == 2:
            changed[at:at] = draw.choice(BYTES)
        elif kind == 3:
            changed[at:at] = changed[at : at + length]
        elif kind == 4:
            other = draw.randrange(len(changed) + 1)
            changed[at : at + length] = changed[other : other + length]
        else:
            changed[at : at + length] = draw.randbytes(length)
    if draw.random() < 0.05:
        del changed[draw.randrange(len(changed) + 1) :]
    return bytes(changed)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within nested lists and mappings."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in list(items):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def restructured(data: Any, draw: Draw) -> Any:
    """Nested data with one to three keys or values changed, in place."""
    for _ in range(draw.randint(1, 3)):
        found = list(places(data))
        if not found:
            return data
        *above, key = draw.choice(found)
        inside = data
        for step in above:
            inside = inside[step]
        kind, other = draw.randrange(6), draw.choice(found)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[draw.choice(KEYS)] = inside.pop(key)
        elif kind == 2:
            inside[key] = at(data, other)
        elif kind == 3:
            inside[key] = deep(draw.choice((3, 50)))
        elif kind == 4 and isinstance(inside[key], int):
            inside[key] = inside[key] * draw.choice((-1, 2, 1000, 2**40)) + draw.choice((0, 1))
        else:
            inside[key] = deepcopy(draw.choice(VALUES))
    return data


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """A copy of the value at `path`."""
    for step in path:
        data = data[step]
    return deepcopy(data)


def deep(depth: int) -> Any:
    """Lists in lists."""
    nested: Any = []
    for _ in range(depth):
        nested = [nested]
    return nested


def as_json(data: bytes, draw: Draw) -> bytes:
    """Changes the structure of JSON three times of four, else its bytes."""
    if draw.random() < 0.25:
        return bytewise(data, draw)
    return json.dumps(restructured(json.loads(data), draw)).encode()


def as_yaml(data: bytes, draw: Draw) -> bytes:
    """As `as_json`, for YAML."""
    if draw.random() < 0.4:
        return bytewise(data, draw)
    text = yaml.safe_dump(restructured(yaml.safe_load(data), draw), allow_unicode=True)
    return text.encode("utf-8", "surrogatepass")


def as_safetensors(data: bytes, draw: Draw) -> bytes:
    """Changes the header's structure, with its length told truly; or tensors; or bytes."""
    kind = draw.random()
    if kind < 0.2:
        return bytewise(data, draw)
    if kind < 0.5:
        return save(retensored(load(data), draw))
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(restructured(json.loads(data[8 : 8 + length]), draw)).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def retensored(tensors: dict[str, torch.Tensor], draw: Draw) -> dict[str, torch.Tensor]:
    """A sound file of other tensors: another shape, type, number or name."""
    name = draw.choice(list(tensors))
    tensor = tensors.pop(name)
    kinds = (torch.int8, torch.float64, torch.bool, torch.float8_e4m3fn, torch.complex64)
    changes: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: tensor[:0],
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.to(draw.choice(kinds)),
        lambda: torch.full_like(tensor, draw.choice((0, 1, 127))),
        lambda: tensor * float("nan") if tensor.is_floating_point() else tensor,
    )
    name = draw.choice((name, name, name, name[:-1], f"x.{name}", name.replace(".", "/"), ""))
    return {**tensors, name: draw.choice(changes)().contiguous().clone()}


SEALED: Mapping[str, Change] = {
    seal.NAME: as_json,
    "adapter_config.json": as_json,
    "recipe.yaml": as_yaml,
}
"""Files of a finished folder that are parsed before they are compared."""


# readers


def targets(folder: Path) -> list[Target]:
    """Every reader, with a scratch `folder` for its files."""
    adapter, codes, state = folder / "adapter", folder / "packed", folder / "checkpoint"
    for path in (adapter, codes, state, folder / "SST-2", folder / "MRPC"):
        path.mkdir()
    peft_format.write(adapter, plain_adapter())
    packed.write(codes, coded_adapter())
    (state / "state.json").write_text(json.dumps(STATE))
    shipped = tuple(path.read_bytes() for path in sorted((ROOT / "recipes").glob("*.yaml")))
    files = {kind: (text,) for kind, text in ROWS.items()} | {"parquet": (parquet(folder),)}

    def fed(path: Path, read: Callable[[], object]) -> Callable[[bytes], object]:
        """Reads with other bytes in a file, and puts its own back."""
        own = path.read_bytes() if path.exists() else b""

        def feed(data: bytes) -> object:
            path.write_bytes(data)
            try:
                return read()
            finally:
                path.write_bytes(own)

        return feed

    recipe = folder / "recipe.yaml"
    found = [
        Target("recipe", shipped, as_yaml, fed(recipe, lambda: recipes.load(recipe))),
        Target("override", OVERRIDES, bytewise, overridden),
        Target(
            "adapter_config.json",
            ((adapter / "adapter_config.json").read_bytes(),),
            as_json,
            fed(adapter / "adapter_config.json", lambda: peft_format.read(adapter)),
        ),
        Target(
            "adapter_model.safetensors",
            ((adapter / "adapter_model.safetensors").read_bytes(),),
            as_safetensors,
            fed(adapter / "adapter_model.safetensors", lambda: peft_format.read(adapter)),
        ),
        Target(
            "packed.json",
            ((codes / packed.HEADER).read_bytes(),),
            as_json,
            fed(codes / packed.HEADER, lambda: packed.read(sealed(codes))),
        ),
        Target(
            "packed.safetensors",
            ((codes / packed.WEIGHTS).read_bytes(),),
            as_safetensors,
            fed(codes / packed.WEIGHTS, lambda: packed.read(sealed(codes))),
        ),
        Target(
            "state.json",
            (json.dumps(STATE).encode(),),
            as_json,
            fed(state / "state.json", lambda: checkpoint.meta(state)),
        ),
    ]
    manifest.write(state)
    card = folder / "lorakit.json"
    found.append(
        Target(
            "lorakit.json",
            (json.dumps(CARD).encode(),),
            as_json,
            fed(card, lambda: trained._card(folder)),
        )
    )
    found.append(
        Target(
            "manifest.json",
            ((state / manifest.NAME).read_bytes(),),
            as_json,
            fed(state / manifest.NAME, lambda: manifest.verify(state)),
        )
    )
    finished = folder / "finished"
    shutil.copytree(adapter, finished)
    (finished / "recipe.yaml").write_bytes(shipped[0])
    seal.write(finished, trained.FILES)
    for name, change in SEALED.items():
        path = finished / name
        seeds = (path.read_bytes(),)
        found.append(
            Target(f"finished/{name}", seeds, change, fed(path, lambda: unbroken(finished)))
        )
    for kind, seeds in files.items():
        path = folder / f"rows.{kind}"
        change = as_json if kind == "json" else bytewise
        found.append(Target(f"rows.{kind}", seeds, change, fed(path, lambda path=path: rows(path))))
    for name, task in (("SST-2", "glue/sst2"), ("MRPC", "glue/mrpc")):
        dev, train = folder / name / "dev.tsv", folder / name / "train.tsv"
        train.write_bytes(GLUE[name])
        found.append(
            Target(
                f"{name}/dev.tsv",
                (GLUE[name],),
                bytewise,
                fed(dev, lambda task=task: glue.read(task, str(folder))),
            )
        )
    return found


def unbroken(folder: Path) -> None:
    """A finished folder as the first reader of a process finds it."""
    seal._check.cache_clear()
    seal.check(folder)


def rows(path: Path) -> object:
    """All rows of a file of the user's own."""
    return list(records(str(path), "data.train"))


def overridden(data: bytes) -> object:
    """A shipped recipe with a broken override."""
    return recipes.load(ROOT / "recipes" / "quickstart.yaml", [data.decode("utf-8", "replace")])


def sealed(folder: Path) -> Path:
    """A packed folder with its checksum made right, as somebody who meant harm would."""
    try:
        header = packed.Header.model_validate_json((folder / packed.HEADER).read_bytes())
    except ValueError:
        return folder
    weights = (folder / packed.WEIGHTS).read_bytes()
    seal = packed._checksum(header, weights)
    sealed = header.model_copy(update={"sha256": seal})
    (folder / packed.HEADER).write_text(sealed.model_dump_json())
    return folder


# valid inputs


def plain_adapter() -> PeftAdapter:
    """Two linears of different ranks and a head."""
    pairs = {
        "encoder.layer.0.attention.self.query": Factors(torch.randn(2, 8), torch.randn(8, 2)),
        "encoder.layer.1.output.dense": Factors(torch.randn(3, 8), torch.randn(8, 3)),
    }
    head = {"weight": torch.randn(2, 8), "bias": torch.randn(2)}
    return PeftAdapter(pairs, {"classifier": head}, "some/base", "SEQ_CLS")


def parquet(folder: Path) -> bytes:
    """Two rows."""
    from pyarrow import parquet, table

    rows = table({"text": ["warm", "dull"], "label": ["good", None], "more": [[1], []]})
    parquet.write_table(rows, folder / "seed.parquet")
    return (folder / "seed.parquet").read_bytes()


def coded_adapter() -> PackedAdapter:
    """Two linears as codes, one with quantisers around it, and a head."""
    step, one = torch.tensor(0.125), torch.tensor(1.0)
    A = Coded(torch.ones(2, 8, dtype=torch.int16), step, 4)
    B = Coded(torch.ones(8, 2, dtype=torch.int16), step, 8)
    E = Coded(torch.ones(2), one, 32)
    pairs = {
        "encoder.query": CodedPair(A, E, B, 0.5, Grids(weight=Grid(torch.tensor(2.0), 8))),
        "encoder.value": CodedPair(A, None, B, 1.0),
    }
    whole = {"classifier": {"weight": torch.randn(2, 8), "bias": torch.randn(2)}}
    return PackedAdapter(pairs, dict.fromkeys(pairs, 4), whole, "some/base", None, ("bad", "good"))


BASE = {"stored": "float32", "commit": None, "tensors": {"encoder.query.weight": "4x4 1a2b3c4d"}}
STATE = {
    "format": 3,
    "lorakit": "0.1",
    "step": 3,
    "progress": {"step": 3, "best": [[2, 90.5]], "stale": 0, "loss": 0.0},
    "labels": ["bad", "good"],
    "head": ["classifier"],
    "whole": ["classifier"],
    "plans": {"encoder.query": [4, 1.0]},
    "scores": {"accuracy": 50.0},
    "precision": "fp32",
    "base": BASE,
}
CARD = {
    "labels": ["bad", "good"],
    "scores": {"accuracy": 50.0},
    "step": 3,
    "precision": "fp32",
    "bytes": [100, 50],
    "start": {"encoder.query": 4},
    "ranks": {"encoder.query": 2},
    "form": "plain",
    "base": BASE,
}
OVERRIDES = (
    b"train.lr=3e-4",
    b"adapter.targets=[query, value]",
    b"adapter.ranks.attention.self.query=4",
    b"~train.lr",
    b"output_dir=runs/try",
    b"adapter.variant=sora",
    b"train={steps: 3}",
)
ROWS = {
    "csv": b'text,label\n"a film, warm",good\ndull,bad\n"two\nlines",bad\n',
    "tsv": b'text\tlabel\n"a ""quote"""\tgood\ndull\tbad\n',
    "jsonl": b'{"text": "warm", "label": "good"}\n{"text": "dull", "label": 0, "more": [1, {}]}\n',
    "json": b'[{"text": "warm", "label": "good"}, {"text": "dull", "label": null, "x": {"y": []}}]',
    "txt": b"a first line\n\na second one\n",
}
GLUE = {
    "SST-2": b'sentence\tlabel\na "warm film\t1\ndull\t0\n',
    "MRPC": b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tone\ttwo\n0\t3\t4\tone\tsix\n",
}


# the run


@dataclass(frozen=True)
class Finding:
    """An input that no message answers."""

    target: str
    number: int
    what: str
    input: bytes


def search(
    target: Target, numbers: range, seed: int, told: Counter[str] | None = None
) -> Iterator[Finding]:
    """Feeds so many inputs; each follows from `seed` and its number alone."""
    told = Counter() if told is None else told
    for number in numbers:
        draw = Draw(f"{seed} {target.name} {number}")
        data = target.change(draw.choice(target.seeds), draw)
        started = process_time()
        signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                target.feed(data)
            told["taken"] += 1
        except LorakitError as error:
            told["refused"] += 1
            if not str(error).strip():
                yield Finding(target.name, number, "an empty message", data)
        except (Exception, TooSlowError) as error:
            yield Finding(target.name, number, f"{type(error).__name__}: {error}", data)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        took = int(1000 * (process_time() - started))
        told["slowest, ms"] = max(told["slowest, ms"], took)


def out_of_time(*_: object) -> None:
    """The alarm."""
    raise TooSlowError(f"more than {LIMIT:g} s")


def main(arguments: list[str] | None = None) -> int:
    """Searches, prints a line for each target and each finding; 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="in all; shared by the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose names hold this word")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    signal.signal(signal.SIGVTALRM, out_of_time)
    findings: list[Finding] = []
    total = 0
    with tempfile.TemporaryDirectory(prefix="lorakit-fuzz-") as name:
        chosen = [target for target in targets(Path(name)) if given.only in target.name]
        share = -(-given.inputs // max(1, len(chosen)))
        for target in chosen:
            told: Counter[str] = Counter()
            found = list(search(target, range(share), given.seed, told))
            findings, total = findings + found, total + share
            print(line(target.name, share, told, len(found)), flush=True)
            for finding in list({f.what: f for f in found}.values())[:10]:
                print(f"  {finding.number}: {finding.what[:300]}\n    {finding.input[:160]!r}")
    print(f"{total:,} inputs, {len(findings)} findings")
    return 1 if findings else 0


def line(name: str, inputs: int, told: Mapping[str, int], findings: int) -> str:
    """A target's row."""
    return (
        f"{name:31} {inputs:8,} inputs  {told['taken']:7,} taken  {told['refused']:7,} refused  "
        f"slowest {told['slowest, ms']:5} ms  {findings} findings"
    )


if __name__ == "__main__":
    sys.exit(main())

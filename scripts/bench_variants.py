"""Times every variant against plain LoRA at the same rank, and measures what training takes.

    python scripts/bench_variants.py --data-dir DIR --precision fp32 bf16 --threads 1

DIR holds GLUE's files (`SST-2/train.tsv`). Model and task are those of the recipe, without its
dropout; linears, rank and rows are the same for all.

*Time.* All models are in one process. In each round every variant takes the same few steps of its
run in the loop of `lorakit.train`, in an order that turns from round to round; the first of them
is not counted, and the seconds of the others are divided by LoRA's in that round. Told are the
median of these ratios and their quartiles. The rounds together are one run, so that warm-up,
schedules and phases have their share in them. --cpu-time counts the seconds that the process
computed, of all its threads, in place of those that passed: on a machine that does other things
too, with one thread.

*Memory.* Each variant takes a short run in a fresh process. Counted is the peak of the resident
memory over that of the loaded base model: adapters, moments, gradients, activations and whatever
the variant computes besides. Large blocks are given back at once (MALLOC_MMAP_THRESHOLD_), so
that what is resident is what is held. Linux alone tells it.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lorakit import recipe, variants
from lorakit.prepare import prepare
from lorakit.tasks import Task
from stepping import Runner

RECIPE = Path(__file__).parents[1] / "recipes" / "lora_sst2.yaml"
PLAIN = "lora"
TARGETS = {"sora": 1.05, "olora": 1.15, "adalora": 1.15, "blora": 1.8}
"""What time and memory may be, as multiples of LoRA's."""
ROWS = 4096
"""Training rows that are tokenized."""


@dataclass(frozen=True)
class Setting:
    """What all variants have in common."""

    recipe: Path
    data_dir: str | None
    precision: str
    rank: int
    cpu_time: bool = False

    def overrides(self, variant: str) -> list[str]:
        """The recipe's, to train `variant`."""
        given = [f"adapter.variant={variant}", f"adapter.rank={self.rank}"]
        given += [f"adapter.alpha={self.rank}", "train.batch_size=32", "model.dropout=0.0"]
        given += [f"model.precision={self.precision}"]
        return given + ([f"task.data_dir={self.data_dir}"] if self.data_dir else [])


def runner(variant: str, setting: Setting, steps: int, task: Task | None = None) -> Runner:
    """A variant in its base model, with a run of `steps` steps ahead."""
    prepared = prepare(recipe.load(setting.recipe, setting.overrides(variant)))
    rows = task or prepared.task.limited("train", ROWS).limited("validation", 1)
    now = process_time if setting.cpu_time else perf_counter
    return Runner(replace(prepared, task=rows), steps, now)


def times(
    names: Sequence[str], setting: Setting, rounds: int, block: int
) -> dict[str, list[list[float]]]:
    """Seconds of steps by variant, for each round, all variants by turns on the same rows."""
    runners: dict[str, Runner] = {}
    task = None
    for name in names:
        runners[name] = runner(name, setting, rounds * (block + 1) + 1, task)
        task = runners[name].task  # tokenized once
    seconds: dict[str, list[list[float]]] = {name: [] for name in names}
    for i in range(rounds):
        turned = [*names[i % len(names) :], *names[: i % len(names)]]
        for name in turned:
            seconds[name].append(runners[name].take(block + 1))
    return seconds


def ratios(seconds: Iterable[Sequence[float]], plain: Iterable[Sequence[float]]) -> list[float]:
    """Of each round's sums."""
    return [sum(own) / sum(other) for own, other in zip(seconds, plain, strict=True)]


def peak(variant: str, setting: Setting, steps: int) -> int:
    """Bytes that a run of so many steps adds to the loaded base model, in a process of its own."""
    options = {
        "peak": variant,
        "recipe": setting.recipe,
        "precision": setting.precision,
        "rank": setting.rank,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }
    if setting.data_dir:
        options["data-dir"] = setting.data_dir
    done = subprocess.run(
        [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(done.stdout)


def own_peak(variant: str, setting: Setting, steps: int) -> int:
    """What `peak` asks of its process.

    A first model, of plain LoRA, has everything imported and the rows tokenized before it counts,
    and stays. So what a variant's start leaves behind is counted as the variant's.
    """
    first = runner(PLAIN, setting, steps)
    next(first.task.steps(1, 1, seed=0))
    before = resident("VmRSS")
    second = runner(variant, setting, steps + 1, first.task)
    for p in second.trainee.model.parameters():
        p.sum()  # a file's weights are resident when they have been read
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident
    second.take(steps)
    return resident("VmHWM") - before - base_bytes(second)


def base_bytes(loaded: Runner) -> int:
    """What the frozen weights take."""
    return sum(p.nbytes for p in loaded.trainee.model.parameters() if not p.requires_grad)


def resident(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def measured(
    names: Sequence[str], setting: Setting, rounds: int, block: int, steps: int
) -> list[dict[str, Any]]:
    """A row for each variant; `steps` 0: memory is not measured."""
    peaks = {name: peak(name, setting, steps) for name in names} if steps else {}
    seconds = times(names, setting, rounds, block)
    rows = []
    for name in names:
        low, middle, high = quantiles(ratios(seconds[name], seconds[PLAIN]), method="inclusive")
        target = TARGETS.get(name)
        row = {
            "variant": name,
            "precision": setting.precision,
            "ms_per_step": 1000 * median(second for block in seconds[name] for second in block),
            "time": middle,
            "time_quartiles": [low, high],
            "peak_bytes": peaks.get(name),
            "memory": peaks[name] / peaks[PLAIN] if peaks else None,
            "target": target,
        }
        both = [ratio for ratio in (row["time"], row["memory"]) if ratio is not None]
        row["met"] = None if target is None else max(both) <= target
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """A line for each variant and precision."""
    result = Table("variant", "precision", "ms a step", "time", "quartiles", "peak MB", "memory")
    result.add_column("at most")
    result.add_column("met")
    for row in rows:
        low, high = row["time_quartiles"]
        missing = row["memory"] is None
        result.add_row(
            row["variant"],
            row["precision"],
            f"{row['ms_per_step']:.0f}",
            f"{row['time']:.3f}",
            f"{low:.3f} - {high:.3f}",
            "" if missing else f"{row['peak_bytes'] / 1e6:.0f}",
            "" if missing else f"{row['memory']:.3f}",
            "" if row["target"] is None else f"{row['target']:.2f}",
            {None: "", True: "yes", False: "no"}[row["met"]],
        )
    return result


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--data-dir", help="a folder in GLUE's layout; none: as the recipe has it")
    parser.add_argument("--variants", nargs="+", default=list(variants.names()), metavar="NAME")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--block", type=int, default=4, help="steps timed in a round")
    parser.add_argument("--steps", type=int, default=20, help="of a run for memory; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Reads the arguments, measures, prints."""
    given = arguments()
    torch.set_num_threads(given.threads)
    settings = [
        Setting(given.recipe, given.data_dir, precision, given.rank, given.cpu_time)
        for precision in given.precision
    ]
    if given.peak:
        print(own_peak(given.peak, settings[0], given.steps))
        return
    names = [PLAIN, *(name for name in given.variants if name != PLAIN)]
    rows = [
        row
        for setting in settings
        for row in measured(names, setting, given.rounds, given.block, given.steps)
    ]
    if given.json:
        print(json.dumps(rows, indent=2))
    else:
        Console(width=110).print(table(rows))


if __name__ == "__main__":
    main()

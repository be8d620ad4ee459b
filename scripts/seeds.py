"""Trains recipes over seeds, prunes and scores what is left, and prints means and spreads.

    python scripts/seeds.py recipes/quickstart.yaml recipes/lora_bbc.yaml --seeds 0 1 2

Each run is a process of its own, one after another, as a person would start it; runs and pruned
folders stay in --out. `run` is the score of the run in the precision it trains in, `pruned` that
of the reloaded folder in fp32; seconds are those of the whole `lorakit train`.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("run", "pruned", "ranks", "kept %", "kB", "seconds")


def lorakit(*arguments: object) -> Any:
    """Types a command and reads its JSON."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    return json.loads(done.stdout)


def measure(recipe: Path, seed: int, out: Path, overrides: Sequence[str]) -> dict[str, float]:
    """One recipe, one seed: the numbers of a row."""
    run = out / f"{recipe.stem}-{seed}"
    started = perf_counter()
    trained = lorakit("train", recipe, f"seed={seed}", f"output_dir={run}", *overrides)
    seconds = perf_counter() - started
    pruned = lorakit("prune", run)
    scored = lorakit("eval", run / "pruned")
    kept, start = sum(pruned["ranks"].values()), sum(pruned["start"].values())
    headline = next(iter(scored["scores"]))
    values = (
        trained["scores"][headline],
        scored["scores"][headline],
        kept,
        100 * kept / start,
        pruned["size"][1] / 1000,
        seconds,
    )
    return dict(zip(COLUMNS, values, strict=True))


def table(rows: dict[str, dict[int, dict[str, float]]]) -> Table:
    """A line for each run, and for each recipe mean and standard deviation."""
    result = Table("recipe", "seed", *COLUMNS)
    for name, runs in rows.items():
        for seed, row in runs.items():
            result.add_row(name, str(seed), *(f"{row[column]:.2f}" for column in COLUMNS))
        result.add_row(name, "mean", *(f"{mean(_all(runs, c)):.2f}" for c in COLUMNS))
        if len(runs) > 1:
            result.add_row(name, "sd", *(f"{stdev(_all(runs, c)):.2f}" for c in COLUMNS))
        result.add_section()
    return result


def _all(runs: dict[int, dict[str, float]], column: str) -> list[float]:
    return [row[column] for row in runs.values()]


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    given = parser.parse_args()
    rows = {
        recipe.stem: {
            seed: measure(recipe, seed, given.out, given.overrides) for seed in given.seeds
        }
        for recipe in given.recipes
    }
    Console(width=100).print(table(rows))


if __name__ == "__main__":
    main()

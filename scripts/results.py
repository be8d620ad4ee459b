"""Trains every method on GLUE tasks over seeds, and pruned LoRA as their rival; prints tables.

    python scripts/results.py --data-dir DIR --tasks sst2 mrpc --seeds 0 1 2 --out runs/results

All start from recipes/lora_sst2.yaml with the same model, start rank, steps, batch and rates of
A and B; a method brings its own settings alone. Each run is a process of its own on one thread,
`--jobs` of them at a time. Scores are those of the pruned folder, read back in fp32, on the whole
validation set. A run that is done is not done again: rows stand in OUT/results.jsonl. How long
steps take is measured by bench_variants.py, side by side.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BASE = ROOT / "recipes" / "lora_sst2.yaml"
STEPS = {"sst2": 400, "mrpc": 345}
METHODS: dict[str, tuple[str, ...]] = {
    "LoRA": (),
    "SoRA, half": ("adapter.variant=sora", "adapter.sparsity.keep=0.5"),
    "SoRA, quarter": ("adapter.variant=sora", "adapter.sparsity.keep=0.25"),
    "SoRA, tenth": ("adapter.variant=sora", "adapter.sparsity.keep=0.1"),
    "B-LoRA": ("adapter.variant=blora", "adapter.gates.lambda_ranks=2e-2"),
    "OLoRA": ("adapter.variant=olora",),
    "AdaLoRA, half": (
        *("adapter.variant=adalora", "adapter.budget.target=4"),
        *("adapter.alpha=64", "train.lr=2e-3"),  # E, A and B all start near 0
    ),
}
RIVALS = {"LoRA cut to half": 0.5, "LoRA cut to a quarter": 0.25, "LoRA cut to a tenth": 0.1}
"""Shares of LoRA's parameters that `prune --keep` leaves."""

Row = dict[str, Any]


class Job(NamedTuple):
    """One run."""

    task: str
    method: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it stands."""
        name = self.method.lower().replace(", ", "-").replace(" ", "-")
        return out / f"{self.task}-{name}-{self.seed}"


def lorakit(*arguments: object) -> Any:
    """Types a command and reads its JSON."""
    command = [sys.executable, "-m", "lorakit", *map(str, arguments), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, env=environment, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def settings(job: Job, given: argparse.Namespace) -> list[str]:
    """What a run sets on top of the recipe; the method's own has the last word but one."""
    return [
        f"task.name=glue/{job.task}",
        f"task.data_dir={given.data_dir}",
        f"seed={job.seed}",
        f"output_dir={job.folder(given.out)}",
        *("~train.epochs", f"train.steps={_steps(job, given)}"),
        *("train.best=null", "train.eval_every=null", "train.save_every=null"),
        *("model.dropout=0.0", "adapter.rank=8", "adapter.alpha=8"),
        *METHODS[job.method],
        *given.overrides,
    ]


def _steps(job: Job, given: argparse.Namespace) -> int:
    return given.steps or STEPS[job.task]


def measure(job: Job, given: argparse.Namespace) -> Row:
    """Trains, prunes and scores; a rival is cut from the LoRA of its task and seed."""
    if job.method in RIVALS:
        run, keep = job._replace(method="LoRA").folder(given.out), RIVALS[job.method]
        cut = _pruned(run, run / f"keep-{keep:g}", "--keep", keep, "--of", "parameters")
        return {**job._asdict(), **cut}
    run = job.folder(given.out)
    last = run / "checkpoints" / "last"
    if not last.exists() or last.read_text() != f"step-{_steps(job, given):06d}\n":
        resume = ["--resume"] if run.exists() else []
        lorakit("train", BASE, *settings(job, given), *resume)
    return {**job._asdict(), **_pruned(run, run / "pruned")}


def _pruned(run: Path, out: Path, *options: object) -> Row:
    """Prunes `run` into `out`, if that is not done, and scores it."""
    if not out.exists():
        lorakit("prune", run, "--out", out, *options)
    card = json.loads((out / "lorakit.json").read_text())
    scored = lorakit("eval", out, "--batch-size", 128)
    forms = card.get("bytes_by_form") or {"plain": card["bytes"][1]}
    return {
        "scores": scored["scores"],
        "ranks": sum(card["ranks"].values()),
        "parameters": card["parameters"][1],
        "kB": forms["plain"] / 1000,
        "packed": forms["packed"] / 1000 if "packed" in forms else None,
    }


def markdown(rows: Sequence[Row]) -> str:
    """A table for each task: a line for each method, mean ± standard deviation over seeds."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        metrics = [name for name in of_task[0]["scores"] if name != "loss"]
        head = ["method", *metrics, "ranks", "parameters", "kB", "packed"]
        lines = [f"### {task}", "", _line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for method in dict.fromkeys(row["method"] for row in of_task):
            seeds = [row for row in of_task if row["method"] == method]
            cells = [_spread((row["scores"][name] for row in seeds), 2) for name in metrics]
            cells += [_spread((row["ranks"] for row in seeds), 0)]
            cells += [_spread((row["parameters"] for row in seeds), 0)]
            cells += [_spread((row["kB"] for row in seeds), 0)]
            packed = [row["packed"] for row in seeds if row["packed"]]
            cells += [_spread(packed, 0) if packed else ""]
            lines.append(_line([method, *cells]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: Iterable[float], digits: int) -> str:
    given = list(values)
    spread = f" ± {stdev(given):,.{digits}f}" if len(given) > 1 and stdev(given) else ""
    return f"{mean(given):,.{digits}f}{spread}"


def main() -> None:
    """Reads the arguments, measures what is not measured yet, prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="GLUE's official layout")
    parser.add_argument("--tasks", nargs="+", default=list(STEPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of every run; default: of each task its own")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file, lock = given.out / "results.jsonl", Lock()
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["task"], row["method"], row["seed"]) for row in rows}

    def work(job: Job) -> None:
        row = measure(job, given)
        with lock, file.open("a") as out:
            out.write(json.dumps(row) + "\n")
            rows.append(row)

    for chosen in (given.methods, RIVALS if "LoRA" in given.methods else ()):
        jobs = [Job(t, m, s) for s in given.seeds for t in given.tasks for m in chosen]
        with ThreadPoolExecutor(given.jobs) as pool:
            list(pool.map(work, [job for job in jobs if job not in done]))
    order = [*METHODS, *RIVALS]
    print(markdown(sorted(rows, key=lambda row: (row["task"], order.index(row["method"])))))


if __name__ == "__main__":
    main()

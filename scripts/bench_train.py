"""Times the same training by Trainer with PEFT and by lorakit, in turn, from the shell's prompt.

    python scripts/bench_train.py --data-dir DIR                        4,096 rows of SST-2
    python scripts/bench_train.py --data-dir DIR --rows 0 --repeats 1   all of them, once
    python scripts/bench_train.py --data-dir DIR --task causal          a language model

What is trained, and what DIR holds, stands in works.py. All train LoRA on the same linears
for as many epochs of the same rows, with the model's own dropout, the same rank, batch, rates and
threads. Each run is a process of its own, with empty caches; who comes first turns from round to
round. Measured are

    rows/s       trained in a second, from the end of the first step to that before the last
    tokens/s     instead, of a language model: prompts too, padding not
    first step   seconds from the start of the process to the end of its first step
    whole        seconds of the process: loading, encoding, training, scoring, saving
    scored/s     validation rows scored in a second
    peak         of resident memory, MB
    accuracy     on the validation rows, at the end; of a language model the loss, which Trainer
                 takes as the mean of its batches

and told as medians with quartiles; then lorakit's as ratios to each peer's in the same round.
`trainer` has Trainer's defaults, `trainer, best` the flags that make it fastest, and `trainer,
chunks` those with all rows joined and cut into equal pieces (peer_trainer.py). Lorakit packs the
rows of a language model; a step has about as many tokens on all sides.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from works import WORKS, Work

HERE = Path(__file__).parent
Measured = dict[str, float]


def units(work: Work) -> dict[str, str]:
    """What is told of a run, and what it is called."""
    name, said = work.speed
    return {
        name: said,
        "first_step_s": "first step",
        "whole_s": "whole",
        "scored_rows_per_s": "scored/s",
        "peak_mb": "peak",
        work.score: work.score,
    }


def command(
    who: str, given: argparse.Namespace, work: Work, model: str, data: Path, seed: int
) -> list[str]:
    """What is typed for a run, but for where it writes."""
    if who.startswith("trainer"):
        options = {
            "task": given.task,
            "model": model,
            "data-dir": data,
            "targets": work.targets,
            "max-length": work.max_length,
            "rank": given.rank,
            "alpha": given.alpha,
            "lr": given.lr,
            "warmup": given.warmup,
            "batch-size": given.batch_size or work.batch_size,
            "eval-batch-size": work.eval_batch_size,
            "epochs": given.epochs,
            "seed": seed,
        }
        named = [f"--{name}={value}" for name, value in options.items()]
        return [str(HERE / "peer_trainer.py"), *named, *work.who[who]]
    settings = {
        "model.name": model,
        "task.max_length": work.max_length,
        "adapter.rank": given.rank,
        "adapter.alpha": given.alpha,
        "adapter.targets": json.dumps([work.targets]),
        "train.lr": given.lr,
        "train.warmup": given.warmup,
        "train.batch_size": given.batch_size or work.batch_size,
        "train.eval_batch_size": work.eval_batch_size,
        "train.epochs": given.epochs,
        **dict.fromkeys(("train.eval_every", "train.save_every", "train.best"), "null"),
        "seed": seed,
    }
    named = [f"{key}={value}" for key, value in settings.items()]
    own = [*named, *work.overrides(data), *work.who[who], *given.overrides]
    return [str(HERE / "peer_lorakit.py"), str(work.recipe), *own]


def run(typed: Sequence[str], out: str, threads: int) -> Measured:
    """One run of a peer with empty caches; `out` is how it is told where to write."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {"HF_DATASETS_CACHE": f"{folder}/datasets", "LORAKIT_CACHE": f"{folder}/cache"}
        return process([*typed, f"{out}={folder}/out"], Path(folder), threads, caches)


def process(
    typed: Sequence[str], scratch: Path, threads: int, environment: Mapping[str, str]
) -> Measured:
    """A peer's process, from its start to its end: what it has measured, its seconds, its peak."""
    given = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MEASURED": str(scratch / "measured.json"),
        "STARTED": str(started := time.time()),
        **environment,
    }
    with (scratch / "log").open("w+") as log:
        peer = subprocess.Popen([sys.executable, *typed], env=given, stdout=log, stderr=log)
        _, status, usage = os.wait4(peer.pid, 0)
        whole = time.time() - started
        log.seek(0)
        if status:
            raise SystemExit(f"{' '.join(typed)}\n{log.read()}")
    found: Measured = json.loads((scratch / "measured.json").read_text())
    computed = usage.ru_utime + usage.ru_stime
    return {**found, "whole_s": whole, "cpu_s": computed, "peak_mb": usage.ru_maxrss / 1024}


def table(rounds: Sequence[dict[str, Measured]], told: Mapping[str, str]) -> Table:
    """A line for each: medians, with quartiles where there are rounds enough."""
    result = Table(f"of {len(rounds)}")
    for name in told.values():
        result.add_column(name, justify="right")
    for who in rounds[0]:
        cells = [spread([measured[who][key] for measured in rounds]) for key in told]
        result.add_row(who, *cells)
    return result


def ratios(rounds: Sequence[dict[str, Measured]], told: Mapping[str, str], score: str) -> Table:
    """Lorakit's numbers over its peers', round by round; of the score, the difference."""
    result = Table("ratio")
    for name in told.values():
        result.add_column(name, justify="right")
    ours, theirs = (
        [who for who in rounds[0] if who.startswith(name)] for name in ("lorakit", "trainer")
    )
    for own, other in ((own, other) for own in ours for other in theirs):
        cells = [
            spread(
                [
                    measured[own][key] - measured[other][key]
                    if key == score
                    else measured[own][key] / measured[other][key]
                    for measured in rounds
                ]
            )
            for key in told
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
    parser.add_argument("--task", choices=WORKS, default="sst2")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--model", help="another base model's folder")
    parser.add_argument("--rows", type=int, default=4096, help="of training; 0: all")
    parser.add_argument("--who", nargs="+", help="all but those in other precisions")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=float, default=0.06)
    parser.add_argument("--batch-size", type=int, help="else as works.py has it")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--set", nargs="+", default=[], dest="overrides", help="of lorakit alone")
    parser.add_argument("--out", type=Path, help="a .jsonl file to add each run's numbers to")
    given = parser.parse_args()
    known = WORKS[given.task].who
    given.who = given.who or [who for who in known if not who.startswith("lorakit, ")]
    if unknown := [who for who in given.who if who not in known]:
        parser.error(f"--who: {unknown[0]}: expected some of {', '.join(known)}")
    return given


def main() -> None:
    """Reads the arguments, runs all by turns, prints."""
    given, rounds, console = arguments(), [], Console(width=140)
    work = WORKS[given.task]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        work.write(given.data_dir, data, given.rows)
        model = given.model or work.model(data)
        for number in range(given.repeats):
            turn = number % len(given.who)
            measured: dict[str, Measured] = {}
            for who in (*given.who[turn:], *given.who[:turn]):
                typed = command(who, given, work, model, data, given.seed + number)
                out = "--out" if who.startswith("trainer") else "output_dir"
                measured[who] = run(typed, out, given.threads)
                told: dict[str, Any] = {"who": who, "seed": given.seed + number, **measured[who]}
                console.print(json.dumps(told), soft_wrap=True)
                if given.out:
                    with given.out.open("a") as file:
                        file.write(json.dumps(told) + "\n")
            rounds.append({who: measured[who] for who in given.who})
    console.print(table(rounds, units(work)))
    console.print(ratios(rounds, units(work), work.score))


if __name__ == "__main__":
    main()

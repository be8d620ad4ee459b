"""Runs `lorakit train` as told, and writes what was measured to $MEASURED, as JSON.

Started by bench_train.py. It only looks on: when steps end, and how long scoring takes.
"""

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorakit.cli import main as lorakit

ENDS: list[float] = []
SCORED: list[tuple[dict[str, float], float]] = []


def look_on() -> None:
    """Has the ends of steps noted, and the seconds of each evaluation."""
    from lorakit import progress, train  # no earlier than the command itself imports them

    tick, evaluate = progress.Watch.tick, train.evaluate

    def noted(watch: progress.Watch, step: int) -> None:
        ENDS.append(time.time())
        tick(watch, step)

    def timed(*given: Any) -> dict[str, float]:
        started = time.time()
        scores = evaluate(*given)
        SCORED.append((scores, time.time() - started))
        return scores

    progress.Watch.tick = noted  # type: ignore[method-assign]
    train.evaluate = timed


def main() -> None:
    """Trains, tells."""
    look_on()
    with suppress(SystemExit):
        lorakit(["train", *sys.argv[1:], "--json"])
    scores, seconds = SCORED[-1]
    batch, rows = int(os.environ["BATCH"]), int(os.environ["DEV_ROWS"])
    measured = {
        "rows_per_s": batch * (len(ENDS) - 2) / (ENDS[-2] - ENDS[0]),  # the last one also scores
        "first_step_s": ENDS[0] - float(os.environ["STARTED"]),
        "scored_rows_per_s": rows / seconds,
        **scores,
    }
    Path(os.environ["MEASURED"]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

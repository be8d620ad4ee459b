"""Runs `lorakit train` as told, and writes what was measured to $MEASURED, as JSON.

Started by bench_train.py and scaling.py. It only looks on: when steps end, what was in them, and
how long scoring takes.
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
ROWS: list[int] = []
TOKENS: list[int] = []
SCORED: list[tuple[dict[str, float], float, int]] = []


def look_on() -> None:
    """Has noted: the ends of steps, their rows and tokens; of each evaluation scores, seconds and
    rows.
    """
    from lorakit import progress, train  # no earlier than the command itself imports them

    tick, evaluate, backward = progress.Watch.tick, train.evaluate, train.backward

    def noted(watch: progress.Watch, step: int) -> None:
        ENDS.append(time.time())
        tick(watch, step)

    def counted(model: Any, task: Any, batches: Any, *given: Any) -> float:
        rows = train.rows_of(batches)
        ROWS.append(len(rows))
        TOKENS.append(int(task.encoded("train").lengths[rows].sum()))
        return backward(model, task, batches, *given)

    def timed(model: Any, task: Any, split: str, *given: Any) -> dict[str, float]:
        started = time.time()
        scores = evaluate(model, task, split, *given)
        SCORED.append((scores, time.time() - started, task.rows(split)))
        return scores

    progress.Watch.tick = noted  # type: ignore[method-assign]
    train.backward, train.evaluate = counted, timed


def main() -> None:
    """Trains, tells."""
    look_on()
    with suppress(SystemExit):
        lorakit(["train", *sys.argv[1:], "--json"])
    scores, scoring, scored = SCORED[-1]
    inner, seconds = slice(1, len(ENDS) - 1), ENDS[-2] - ENDS[0]  # the last one also scores
    measured = {
        "rows_per_s": sum(ROWS[inner]) / seconds,
        "tokens_per_s": sum(TOKENS[inner]) / seconds,
        "first_step_s": ENDS[0] - float(os.environ["STARTED"]),
        "scored_rows_per_s": scored / scoring,
        **scores,
    }
    Path(os.environ["MEASURED"]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

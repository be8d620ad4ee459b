"""Runs as a kill would leave them, and their metrics, to be compared."""

import json
import shutil
from pathlib import Path
from typing import Any


def stop_after(run: Path, step: int) -> None:
    """Leaves `run` as a kill some steps after its checkpoint of `step` would."""
    for folder in (run / "checkpoints").glob("step-*"):
        if number(folder) > step:
            shutil.rmtree(folder)
    (run / "checkpoints" / "last").write_text(f"step-{step:06d}\n")
    (run / "checkpoints" / "best").unlink(missing_ok=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')


def number(folder: Path) -> int:
    """Of the step whose checkpoint it is."""
    return int(folder.name.removeprefix("step-"))


def metrics(run: Path) -> list[dict[str, Any]]:
    """All rows, without the one number that is a time."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "samples_per_s"} for row in rows]

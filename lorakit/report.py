"""What a run folder tells of a run, read from its files alone."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple


class StageEnd(NamedTuple):
    """How a stage of a run ended: a point of the curve of score against ranks kept."""

    stage: int
    """Counts from 0."""
    step: int
    ranks: int
    """Live, over all linears."""
    metric: str
    validation: float
    """On the validation rows: generalisation."""
    train: float
    """On the fixed sample of training rows: memorisation."""


def stage_ends(run: Path) -> list[StageEnd]:
    """The ends of a run's stages, in order; none for a run of a single stage."""
    rows = list(_rows(run / "metrics.jsonl"))
    live = {row["step"]: sum(row["ranks"].values()) for row in rows if "ranks" in row}
    ends = []
    for row in rows:
        if "stage" in row:
            metric = next(iter(row["train"]))
            ends.append(
                StageEnd(
                    row["stage"],
                    row["step"],
                    live[row["step"]],
                    metric,
                    row[metric],
                    row["train"][metric],
                )
            )
    return ends


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)

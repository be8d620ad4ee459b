"""Scores a causal language model on the tasks of lm-evaluation-harness. The only importer of it.

The model is the one that lorakit has opened, base and adapter: nothing is merged or written first.
Numbers, names of metrics and standard errors are the harness's own, so that they can be compared.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from sys import stderr
from typing import Any, NamedTuple

from lorakit import tasks
from lorakit.engine import Engine
from lorakit.errors import DataError, LorakitError, nearest, no_such
from lorakit.evaluate import Wanted
from lorakit.trained import Trained

PACKAGE = "lm-eval"
LISTS = {
    "commonsense": ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa", "piqa"),
}
"""Several tasks by one name; `commonsense` is what OLoRA was measured on (arXiv:2406.01775)."""


@dataclass(frozen=True)
class Measured:
    """What the harness found."""

    path: Path
    harness: str
    """Its version."""
    precision: str
    limit: int | None
    few_shot: int | None
    """Examples before each question; null: as each task has it."""
    rows: dict[str, int]
    """How many were asked, by task."""
    scores: dict[str, dict[str, float]]
    """By task and metric, in the harness's words; `acc` is a share of 1."""
    errors: dict[str, dict[str, float]]
    """The standard errors of those that have one."""
    notes: tuple[str, ...] = ()


class Asked(NamedTuple):
    """Tasks of the harness, found."""

    names: tuple[str, ...]
    manager: Any
    """The harness's own finder, which loads them."""


def find(given: str, include: Path | None) -> Asked:
    """The tasks written in `given` with commas, lists of `LISTS` among them, each once.

    `include` is a folder with tasks of the user's.

    Raises:
        LorakitError: the package is missing, or a task is not known.

    """
    parts = [name.strip() for name in given.split(",") if name.strip()]
    names = tuple(dict.fromkeys(task for name in parts for task in LISTS.get(name, (name,))))
    if find_spec("lm_eval") is None:
        raise LorakitError(
            f"--task {given}: {no_such('task', given, tasks.names())} Others are asked by "
            "lm-evaluation-harness, which is not installed; pip install 'lorakit[lm-eval]'."
        )
    if include is not None and not include.is_dir():
        raise LorakitError(f"--include-path: {include}: there is no such folder.")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # a warning tells of what is meant here
    for manager in _managers(include):
        unknown = [name for name in names if not manager.match_tasks([name])]
        if not unknown:
            return Asked(names, manager)
    near = nearest(unknown[0], [*tasks.names(), *LISTS, *manager.all_tasks])
    raise LorakitError(
        f"--task: no task {unknown[0]!r}, of lorakit's or of lm-evaluation-harness's.{near}"
    )


def _managers(include: Path | None) -> Iterator[Any]:
    """Finders of the harness: of the user's tasks alone, then of all. The latter reads some 15,000
    files, for ten seconds.
    """
    from lm_eval.tasks import TaskManager

    if include is not None:
        yield TaskManager(include_path=str(include), include_defaults=False)
    yield TaskManager(include_path=None if include is None else str(include))


def measure(trained: Trained, asked: Asked, wanted: Wanted, precision: str) -> Measured:
    """Scores `trained` on tasks of the harness.

    Raises:
        LorakitError: the model is no causal language model.
        DataError: the rows of a task cannot be loaded.

    """
    if trained.head.kind != "CAUSAL_LM":
        raise LorakitError(
            f"--task {wanted.task}: lm-evaluation-harness asks causal language models, and "
            f"{trained.path} has a head of kind {trained.head.kind}. Tasks of lorakit's own: "
            f"{', '.join(tasks.names())}."
        )
    from lm_eval.models.huggingface import HFLM

    engine = Engine()
    model = trained.model.to(engine.device)
    asking = HFLM(pretrained=model, tokenizer=trained.tokenizer, batch_size=wanted.batch_size)
    found = _answers(asking, asked, wanted)
    return Measured(
        path=trained.path,
        harness=version(PACKAGE),
        precision=precision,
        limit=wanted.limit,
        few_shot=wanted.few_shot,
        rows={task: counts["effective"] for task, counts in found["n-samples"].items()},
        scores={task: _values(row, errors=False) for task, row in found["results"].items()},
        errors={task: _values(row, errors=True) for task, row in found["results"].items()},
    )


def _answers(model: Any, asked: Asked, wanted: Wanted) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    try:
        with redirect_stdout(stderr):  # where results are printed, nothing else is
            found: dict[str, Any] = simple_evaluate(
                model=model,
                tasks=list(asked.names),
                num_fewshot=wanted.few_shot,
                limit=wanted.limit,
                task_manager=asked.manager,
                log_samples=False,
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"--task {wanted.task}: lm-evaluation-harness cannot ask: {reason}\n"
            "  Offline, give tasks of your own, with their rows, by --include-path."
        ) from error
    return found


def _values(row: dict[str, Any], errors: bool) -> dict[str, float]:
    """`acc,none` and `acc_stderr,none` as `acc`, of those that are numbers; `none` is no filter."""
    found = {}
    for key, value in row.items():
        metric, _, kept = key.partition(",")
        is_error = metric.endswith("_stderr")
        if kept and is_error == errors and isinstance(value, int | float):
            name = metric.removesuffix("_stderr")
            found[name if kept == "none" else f"{name},{kept}"] = float(value)
    return found

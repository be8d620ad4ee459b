"""Going on with a run: what must be as it was, and what is put back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lorakit import checkpoint, run_folder
from lorakit import recipe as recipes
from lorakit.disk import sweep, write_text
from lorakit.engine import Engine
from lorakit.environment import changes, environment
from lorakit.errors import FolderError, several
from lorakit.models import fingerprint
from lorakit.prepare import Prepared, settled
from lorakit.sections import Recipe
from lorakit.trainee import Trainee


class Found(NamedTuple):
    """Where a run was left."""

    last: Path | None
    """The newest whole checkpoint; none where it was stopped before the first."""
    warnings: tuple[str, ...]
    """What a person must know: of checkpoints that were broken since, and what is other now."""


def check(recipe: Recipe, folder: Path) -> None:
    """Raises FolderError unless `folder` is a run of this same recipe."""
    if not (folder / "recipe.yaml").is_file():
        raise FolderError(f"--resume: {folder} is no run folder; start without --resume.")
    _refuse_other(recipe, folder)


def find(folder: Path, prepared: Prepared, force: bool) -> Found:
    """Where the run in `folder` is to go on; nothing is touched.

    Raises:
        FolderError: no checkpoint is whole; or the recipe, the base or the rows are others than
            those it was trained on (of the last two, unless `force` says to go on).

    """
    last, broken = run_folder.newest(folder)
    faults = [f"{fault}\n  It was put aside; an older checkpoint is taken." for fault in broken]
    if last is None:
        return Found(None, tuple(faults))
    _refuse_other(prepared.recipe, last)
    meta, here = checkpoint.meta(last), prepared.base.fingerprint
    faults += fingerprint.refuse_other(last, meta.base, here, None if force else "Put it back")
    faults += _other_rows(last, meta.origins, prepared.task.origins, force)
    return Found(last, tuple(faults))


def put_back(folder: Path, last: Path | None, trainee: Trainee, engine: Engine) -> None:
    """Puts back all but the weights, and drops what was written after it.

    Raises:
        FolderError: the checkpoint does not fit, or the run's rows cannot be read.

    """
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror}.") from error
    if last is not None:
        checkpoint.load_state(last, trainee)
    if not engine.is_main:
        return
    if last is not None:
        run_folder.put_aside(folder, behind=last)
    for place in (folder, folder / "checkpoints"):
        sweep(place)
    kept = [line for line in lines if _step_of(line) <= trainee.progress.step]
    write_text(path, "".join(kept))


def moved(folder: Path, engine: Engine) -> list[str]:
    """What is different here from where the run was started."""
    try:
        then = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        return changes(then, environment(engine))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ["the environment of its start cannot be read"]


def _other_rows(
    folder: Path,
    then: Mapping[str, str | None],
    now: Mapping[str, str | None],
    force: bool,
) -> tuple[str, ...]:
    """What is to be said of rows that are others than those the checkpoint was trained on.

    Raises:
        FolderError: instead, but for `force`.

    """
    known = {name: origin for name, origin in now.items() if origin and then.get(name)}
    faults = [f"{n}: {then[n]} then, {here} now" for n, here in known.items() if then[n] != here]
    if not faults:
        return ()
    fault = several(f"{folder} was trained on other rows", faults)
    if not force:
        raise FolderError(f"{fault}\n  Put them back, or go on by --force.")
    return (fault,)


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite where a crash, or a disk, left no such line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return float("inf")


def _refuse_other(recipe: Recipe, folder: Path) -> None:
    """Raises FolderError where `folder`, a run or a checkpoint, carries another recipe.

    Earlier versions left more to be found from the rows: what they wrote is settled as well.
    """
    then, _ = settled(recipes.restore(folder))
    if changed := recipes.differences(then, recipe):
        raise FolderError(several(f"--resume: {folder} was started with another recipe", changed))

"""A run's folder: what training leaves on disk, and which of its checkpoints is meant.

    runs/NAME/
        recipe.yaml              as resolved; enough to build the run again
        environment.json         versions, commit, hardware
        metrics.jsonl            one object a line: step, loss, norm, lr, ranks; or step and scores
        checkpoints/
            step-000500/         may be copied away and pruned elsewhere: see lorakit/checkpoint.py
            best, last           text files: which step that is

All of it is written under a temporary name, fsynced, then renamed, but for metrics.jsonl, which
grows.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain, count
from pathlib import Path

from torch import nn

from lorakit import checkpoint
from lorakit.checkpoint import Meta
from lorakit.disk import remove, write_text
from lorakit.errors import FolderError, nearest, several
from lorakit.trainee import Trainee


def name_of(step: int) -> str:
    """Padded, so that names sort by time."""
    return f"step-{step:06d}"


def save(run: Path, trainee: Trainee, whole: Mapping[str, nn.Module], meta: Meta) -> Path:
    """Writes the checkpoint of `trainee.progress.step` and points `last` (and `best`) to it."""
    name, checkpoints = name_of(meta.step), run / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    folder = checkpoints / name
    if not folder.exists():
        recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
        checkpoint.write(folder, trainee, whole, meta, recipe)
    write_text(checkpoints / "last", name + "\n")
    best = trainee.progress.best_step
    if best is None:
        (checkpoints / "best").unlink(missing_ok=True)
    else:
        write_text(checkpoints / "best", name_of(best) + "\n")
    return folder


def thin_out(run: Path, count: int, due: Callable[[int], bool], spared: Container[int]) -> None:
    """Removes the checkpoints that are not `staying`."""
    folders = {_step_of(folder): folder for folder in _steps(run)}
    for step in folders.keys() - staying(list(folders), count, due, spared):
        remove(folders[step])


def staying(
    steps: Sequence[int], count: int, due: Callable[[int], bool], spared: Container[int]
) -> set[int]:
    """Which of `steps`, in order, stay: the last, to go on from; the newest `count` of those that
    were `due`; and those `spared`.

    One that was not due, saved since it was the best or the run was stopped, takes no other's
    place: a run that was stopped keeps what it would have kept.
    """
    regular = [step for step in steps if due(step)]
    return {*steps[-1:], *regular[-count:], *(step for step in steps if step in spared)}


def find(path: Path, which: str | None = None) -> Path:
    """The checkpoint folder that `path`, a run or a checkpoint, means; it is as it was written.

    `which` is `best`, `last` or a step; null means best, else last.

    Raises:
        FolderError: there is none, and what is there; or it was changed, and which others are
            whole.

    """
    found = _named(path, which)
    try:
        checkpoint.verify(found)
    except FolderError as error:
        others = (folder for folder in _steps(found.parent.parent) if folder != found)
        whole = [str(_step_of(folder)) for folder in others if _is_whole(folder)]
        hint = f"\n  Whole are: {', '.join(whole)}; choose by --checkpoint." if whole else ""
        raise FolderError(f"{error}{hint}") from None
    return found


def newest(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The last checkpoint that is as it was written, and what is wrong with those behind it.

    Raises:
        FolderError: there are checkpoints, and none is whole.

    """
    said: list[str] = []
    for folder in reversed(_steps(run)):
        try:
            checkpoint.verify(folder)
        except FolderError as error:
            said.append(str(error))
        else:
            return folder, tuple(said)
    if said:
        raise FolderError(several(f"{run} has no whole checkpoint", said))
    return None, ()


def last_good(run: Path) -> Path | None:
    """The newest whole checkpoint behind which no step was left out for want of a finite loss; the
    newest of all, where each is.
    """
    whole = [folder for folder in reversed(_steps(run)) if _is_whole(folder)]
    good = (folder for folder in whole if not checkpoint.left_out(folder))
    return next(good, whole[0] if whole else None)


def newest_run(folder: Path) -> Path:
    """The run under `folder` that was written to last.

    Raises:
        FolderError: there is none.

    """
    runs = [p.parent for p in folder.glob("*/checkpoints") if (p / "last").is_file()]
    if not runs:
        raise FolderError(f"no run under {folder}/ yet; name a run, a checkpoint or a PEFT folder.")
    return max(runs, key=lambda run: (run / "checkpoints" / "last").stat().st_mtime_ns)


def put_aside(run: Path, behind: Path) -> None:
    """Gives the checkpoints behind one a name that begins with `broken-`: the run will come to
    their steps again. What was put aside before stays.
    """
    for folder in _steps(run):
        if _step_of(folder) > _step_of(behind):
            aside = folder.with_name(f"broken-{folder.name}")
            further = (aside.with_name(f"{aside.name}-{n}") for n in count(2))
            folder.rename(next(name for name in chain([aside], further) if not name.exists()))


def _is_whole(folder: Path) -> bool:
    try:
        checkpoint.verify(folder)
    except FolderError:
        return False
    return True


def _named(path: Path, which: str | None) -> Path:
    """The checkpoint folder that `path` and `which` mean."""
    if (path / "state.json").is_file():
        if which is not None:
            raise FolderError(f"{path} is a checkpoint already; --checkpoint chooses within a run.")
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise FolderError(f"{path} is no run and no checkpoint{_what_is(path)}.")
    names = [which] if which in ("best", "last") else ["best", "last"] if which is None else []
    steps = [p.name for p in _steps(path)]
    for name in names:
        if (folder / name).is_file():
            return folder / _pointed_to(folder / name, steps)
    if which is not None and which.isdecimal() and name_of(int(which)) in steps:
        return folder / name_of(int(which))
    known = [str(int(s.removeprefix("step-"))) for s in steps]
    wanted = f"no checkpoint {which!r}" if which else "no checkpoint"
    here = ", ".join(known) or "none"
    raise FolderError(f"{path} has {wanted}.{nearest(which or '', known)} Steps here: {here}.")


def _pointed_to(pointer: Path, steps: Sequence[str]) -> str:
    name = pointer.read_bytes().decode(errors="replace").strip()
    if name not in steps:
        raise FolderError(
            f"{pointer} names {name[:40]!r}, no checkpoint here; choose by --checkpoint among: "
            f"{', '.join(str(int(s.removeprefix('step-'))) for s in steps) or 'none'}."
        )
    return name


def _steps(run: Path) -> list[Path]:
    """All checkpoints of a run, in the order of their steps."""
    found = (run / "checkpoints").glob("step-*")
    return sorted((path for path in found if path.name[5:].isdecimal()), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _what_is(path: Path) -> str:
    if not path.exists():
        return ": there is nothing of that name"
    whole = (path / "config.json").is_file()
    return ", but a whole model, which transformers loads by itself" if whole else ""

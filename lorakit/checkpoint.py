"""A run's folder: what training leaves on disk, and how it comes back.

    runs/NAME/
        recipe.yaml              as resolved; enough to build the run again
        environment.json         versions, commit, hardware
        metrics.jsonl            one object a line: step, loss, norm, lr, ranks; or step and scores
        checkpoints/
            step-000500/         whole in itself: may be copied away and pruned elsewhere
                recipe.yaml
                adapter.safetensors    LAYER.PARAMETER; nothing of the base
                head.safetensors       the modules trained whole
                state.safetensors      optimizer, controller, random state: to resume
                state.json             progress, labels, versions
                manifest.json          sizes and SHA-256 of the other files
            best, last           text files: which step that is

Written under a temporary name, fsynced, then renamed. A checkpoint that is not as it was written is
refused. No pickle: tensors are safetensors, the rest is JSON.
"""

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as encoded
from torch import Tensor, nn

from lorakit import __version__, manifest
from lorakit.adapter import Adapter
from lorakit.disk import remove, whole_folder, write_text
from lorakit.errors import FolderError, nearest, several
from lorakit.models import CLASSIFIER, Head
from lorakit.optim import load_state_tensors, state_tensors
from lorakit.schema import misfits
from lorakit.train import Progress, Trainee

FORMAT = 2
"""1 had no manifest, and was of classifiers only."""


class Meta(NamedTuple):
    """What state.json says."""

    step: int
    progress: dict[str, Any]
    labels: tuple[str, ...]
    head: tuple[str, ...]
    whole: tuple[str, ...]
    plans: dict[str, tuple[int, float]]
    """Rank and scale that every layer started with, by name."""
    scores: dict[str, float]
    """On the validation rows at this step, if it was evaluated."""
    precision: str
    format: int = FORMAT
    kind: str | None = CLASSIFIER
    """PEFT's word for the task."""
    multiple: bool = False
    """Whether a text may have any number of the labels."""

    @property
    def task_head(self) -> Head:
        """The last layer that the task asked for."""
        return Head(self.labels, self.kind, self.multiple)


def name_of(step: int) -> str:
    """Padded, so that names sort by time."""
    return f"step-{step:06d}"


def save(run: Path, trainee: Trainee, whole: Mapping[str, nn.Module], meta: Meta) -> Path:
    """Writes the checkpoint of `trainee.progress.step` and points `last` (and `best`) to it."""
    name, checkpoints = name_of(meta.step), run / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    folder = checkpoints / name
    if not folder.exists():
        with whole_folder(folder) as temporary:
            _write(_adapter_tensors(trainee.layers), temporary / "adapter.safetensors")
            _write(_whole_tensors(whole), temporary / "head.safetensors")
            _write(_state_tensors(trainee), temporary / "state.safetensors")
            state = {"lorakit": __version__, **meta._asdict()}
            (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
            (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
            manifest.write(temporary)
    write_text(checkpoints / "last", name + "\n")
    best = trainee.progress.best_step
    if best is None:
        (checkpoints / "best").unlink(missing_ok=True)
    else:
        write_text(checkpoints / "best", name_of(best) + "\n")
    return folder


def keep_newest(run: Path, count: int, spared: Container[int]) -> None:
    """Removes all checkpoints but the newest, the best, and those of the steps `spared`."""
    steps = _steps(run)
    best = run / "checkpoints" / "best"
    named = best.read_text().strip() if best.is_file() else None
    for folder in steps[:-count]:
        if folder.name != named and _step_of(folder) not in spared:
            remove(folder)


def find(path: Path, which: str | None = None) -> Path:
    """The checkpoint folder that `path`, a run or a checkpoint, means; it is as it was written.

    `which` is `best`, `last` or a step; null means best, else last.

    Raises:
        FolderError: there is none, and what is there; or it was changed, and which others are
            whole.

    """
    found = _named(path, which)
    try:
        verify(found)
    except FolderError as error:
        others = (folder for folder in _steps(found.parent.parent) if folder != found)
        whole = [str(_step_of(folder)) for folder in others if _is_whole(folder)]
        hint = f"\n  Whole are: {', '.join(whole)}; choose by --checkpoint." if whole else ""
        raise FolderError(f"{error}{hint}") from None
    return found


def newest(run: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The last checkpoint that is as it was written, and what is to be said of later ones.

    Those are put out of the way, under a name that begins with `broken-`: the run will come to
    their steps again.

    Raises:
        FolderError: there are checkpoints, and none is whole.

    """
    steps, said = _steps(run), []
    for folder in reversed(steps):
        try:
            verify(folder)
        except FolderError as error:
            said.append(str(error))
            continue
        for broken in steps[steps.index(folder) + 1 :]:
            broken.rename(broken.with_name(f"broken-{broken.name}"))
        return folder, tuple(said)
    if said:
        raise FolderError(several(f"{run} has no whole checkpoint", said))
    return None, ()


def verify(folder: Path) -> None:
    """Raises FolderError, naming the files, where a checkpoint is not as it was written."""
    if (folder / manifest.NAME).exists() or meta(folder).format > 1:
        manifest.verify(folder)


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
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


def meta(folder: Path) -> Meta:
    """What a checkpoint says of itself.

    Raises:
        FolderError: state.json is missing, broken or of a later format; all faults are listed.

    """
    path = folder / "state.json"
    try:
        state = json.loads(path.read_bytes())
        if state["format"] > FORMAT:
            raise FolderError(
                f"{folder} has format {state['format']}; this lorakit reads up to {FORMAT}."
            )
        del state["lorakit"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error
    return _typed(Meta, state, path)


T = TypeVar("T")


def _typed(kind: type[T], given: Mapping[str, Any], path: Path) -> T:
    """What was read, as what it must be; raises FolderError with every key that is not so."""
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        raise FolderError(several(f"{path} cannot be read", misfits(error))) from None


def load_weights(
    folder: Path, layers: Mapping[str, Adapter], whole: Mapping[str, nn.Module]
) -> None:
    """Fills adapters and head from a checkpoint; layers that were compacted there are so here.

    Raises:
        FolderError: a file is broken, or names or shapes differ; all differences are listed.

    """
    saved = _read(folder / "adapter.safetensors")
    for name, layer in layers.items():
        _compact_like(layer, {key: saved.get(f"{name}.{key}") for key in layer.ranked})
    copy_into(_adapter_tensors(layers), saved, folder)
    copy_into(_whole_tensors(whole), _read(folder / "head.safetensors"), folder)


def load_state(folder: Path, trainee: Trainee) -> None:
    """Puts back what a run needs to go on as if it had never stopped.

    Raises:
        FolderError: a part of it is missing, or is another run's.

    """
    path = folder / "state.safetensors"
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "controller": {}, "random": {}}
    progress = _typed(Progress, meta(folder).progress, folder / "state.json")
    try:
        for key, value in _read(path).items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        if not parts["optimizer"]:
            raise ValueError("no moments of the optimizer")
        load_state_tensors(trainee.model, trainee.optimizer, parts["optimizer"])
        trainee.controller.load_state_dict(parts["controller"])
        torch.set_rng_state(parts["random"].pop("cpu"))
        for name, state in parts["random"].items():
            torch.cuda.set_rng_state(state, int(name))
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise FolderError(f"{path} does not fit this run: {error!r}.") from error
    vars(trainee.progress).update(asdict(progress))


@torch.no_grad()
def copy_into(wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copies `saved` over `wanted`, which must have the same names and shapes.

    Raises:
        FolderError: with every difference.

    """
    faults = [f"{key}: not in the checkpoint" for key in sorted(wanted.keys() - saved.keys())]
    faults += [f"{key}: not in the model" for key in sorted(saved.keys() - wanted.keys())]
    faults += [
        f"{key}: {tuple(saved[key].shape)} on disk, {tuple(wanted[key].shape)} in the model"
        for key in sorted(saved.keys() & wanted.keys())
        if saved[key].shape != wanted[key].shape
    ]
    if faults:
        raise FolderError(several(f"{folder} does not fit this model", faults))
    for key, value in wanted.items():
        value.copy_(saved[key])


def _compact_like(layer: Adapter, saved: Mapping[str, Tensor | None]) -> None:
    """Gives a layer as many ranks as `saved` has; which ones does not matter, they are filled."""
    ranks = {
        value.shape[layer.ranked[key]]
        for key, value in saved.items()
        if value is not None and value.ndim > layer.ranked[key]
    }
    if len(ranks) == 1 and (rank := ranks.pop()) < layer.r:
        layer.compact(torch.arange(rank))


def _adapter_tensors(layers: Mapping[str, Adapter]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, layer in layers.items()
        for key, value in layer.own_state().items()
    }


def _whole_tensors(whole: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.contiguous()
        for name, module in whole.items()
        for key, value in module.state_dict().items()
    }


def _state_tensors(trainee: Trainee) -> dict[str, Tensor]:
    random = {"cpu": torch.get_rng_state()}
    random |= {str(i): state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    parts = {
        "optimizer": state_tensors(trainee.model, trainee.optimizer),
        "controller": trainee.controller.state_dict(),
        "random": random,
    }
    return {
        f"{part}/{name}": value.contiguous()
        for part, tensors in parts.items()
        for name, value in tensors.items()
    }


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As bytes, so that a full disk is an OSError as everywhere."""
    path.write_bytes(encoded(dict(tensors)))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error
    return tensors


def _what_is(path: Path) -> str:
    return "" if path.exists() else ": there is nothing of that name"

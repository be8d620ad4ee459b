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
            best, last           text files: which step that is

Written under a temporary name, fsynced, then renamed. No pickle: tensors are safetensors, the rest
is JSON.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit import __version__
from lorakit.adapter import Adapter
from lorakit.disk import whole_folder, write_text
from lorakit.errors import FolderError, nearest, several
from lorakit.models import CLASSIFIER, Head
from lorakit.optim import load_state_tensors, state_tensors
from lorakit.train import Progress, Trainee

FORMAT = 1


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
            save_file(_adapter_tensors(trainee.layers), temporary / "adapter.safetensors")
            save_file(_whole_tensors(whole), temporary / "head.safetensors")
            save_file(_state_tensors(trainee), temporary / "state.safetensors")
            state = {"format": FORMAT, "lorakit": __version__, **meta._asdict()}
            (temporary / "state.json").write_text(json.dumps(state, indent=1) + "\n")
            recipe = (run / "recipe.yaml").read_text(encoding="utf-8")
            (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
    write_text(checkpoints / "last", name + "\n")
    best = trainee.progress.best_step
    if best is None:
        (checkpoints / "best").unlink(missing_ok=True)
    else:
        write_text(checkpoints / "best", name_of(best) + "\n")
    return folder


def find(path: Path, which: str | None = None) -> Path:
    """The checkpoint folder that `path`, a run or a checkpoint, means.

    `which` is `best`, `last` or a step; null means best, else last.

    Raises:
        FolderError: there is none; says what is there.

    """
    if (path / "state.json").is_file():
        if which is not None:
            raise FolderError(f"{path} is a checkpoint already; --checkpoint chooses within a run.")
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise FolderError(f"{path} is no run and no checkpoint{_what_is(path)}.")
    names = [which] if which in ("best", "last") else ["best", "last"] if which is None else []
    for name in names:
        if (folder / name).is_file():
            return folder / (folder / name).read_text().strip()
    steps = sorted(p.name for p in folder.glob("step-*"))
    if which is not None and which.isdecimal() and name_of(int(which)) in steps:
        return folder / name_of(int(which))
    known = [str(int(s.removeprefix("step-"))) for s in steps]
    wanted = f"no checkpoint {which!r}" if which else "no checkpoint"
    here = ", ".join(known) or "none"
    raise FolderError(f"{path} has {wanted}.{nearest(which or '', known)} Steps here: {here}.")


def meta(folder: Path) -> Meta:
    """What a checkpoint says of itself.

    Raises:
        FolderError: state.json is missing, broken or of a later format.

    """
    try:
        state = json.loads((folder / "state.json").read_text())
        given = state.pop("format")
        state.pop("lorakit")
        if given > FORMAT:
            raise FolderError(f"{folder} has format {given}; this lorakit reads up to {FORMAT}.")
        found = Meta(**state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{folder / 'state.json'} cannot be read: {error}.") from error
    return found._replace(
        labels=tuple(found.labels),
        head=tuple(found.head),
        whole=tuple(found.whole),
        plans={name: (rank, scale) for name, (rank, scale) in found.plans.items()},
    )


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
    """Puts back what a run needs to go on as if it had never stopped."""
    tensors = _read(folder / "state.safetensors")
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "controller": {}, "random": {}}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    load_state_tensors(trainee.model, trainee.optimizer, parts["optimizer"])
    trainee.controller.load_state_dict(parts["controller"])
    vars(trainee.progress).update(asdict(Progress(**meta(folder).progress)))
    torch.set_rng_state(parts["random"].pop("cpu"))
    for name, state in parts["random"].items():
        torch.cuda.set_rng_state(state, int(name))


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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error
    return tensors


def _what_is(path: Path) -> str:
    return "" if path.exists() else ": there is nothing of that name"

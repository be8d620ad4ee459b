"""One checkpoint: a folder that is whole in itself, written and read.

    recipe.yaml
    adapter.safetensors    LAYER.PARAMETER; nothing of the base
    head.safetensors       the modules trained whole
    state.safetensors      optimizer, controller, random state: to resume
    state.json             progress, labels, versions
    manifest.json          sizes and SHA-256 of the other files

One that is not as it was written is refused. No pickle: tensors are safetensors, the rest is JSON.
"""

import json
from collections.abc import Mapping
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
from lorakit.disk import whole_folder
from lorakit.errors import FolderError, several
from lorakit.models.fingerprint import Fingerprint
from lorakit.models.heads import CLASSIFIER, Head
from lorakit.optim import load_state_tensors, state_tensors
from lorakit.schema import misfits
from lorakit.trainee import Progress, Trainee

FORMAT = 3
"""1 had no manifest, and was of classifiers only; 2 knew one best step, and not its base."""


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
    base: Fingerprint | None = None
    """Of the base model that it was trained over."""
    origins: dict[str, str | None] = {}  # noqa: RUF012
    """Of the rows that it was trained on, as `data.Splits` has them."""

    @property
    def task_head(self) -> Head:
        """The last layer that the task asked for."""
        return Head(self.labels, self.kind, self.multiple)


def write(
    folder: Path, trainee: Trainee, whole: Mapping[str, nn.Module], meta: Meta, recipe: str
) -> None:
    """Makes the folder; `recipe` is the text of the run's own."""
    with whole_folder(folder) as temporary:
        _write(_adapter_tensors(trainee.layers), temporary / "adapter.safetensors")
        _write(_whole_tensors(whole), temporary / "head.safetensors")
        _write(_state_tensors(trainee), temporary / "state.safetensors")
        state = {"lorakit": __version__, **meta._asdict()}
        (temporary / "state.json").write_text(json.dumps(state, indent=1, default=asdict) + "\n")
        (temporary / "recipe.yaml").write_text(recipe, encoding="utf-8")
        manifest.write(temporary)


def verify(folder: Path) -> None:
    """Raises FolderError, naming the files, where a checkpoint is not as it was written."""
    if (folder / manifest.NAME).exists() or meta(folder).format > 1:
        manifest.verify(folder)


def meta(folder: Path) -> Meta:
    """What a checkpoint says of itself.

    Raises:
        FolderError: state.json is missing, broken or of a later format; all faults are listed.

    """
    path = folder / "state.json"
    if not path.is_file():  # a device, or a pipe, would be read without end
        raise FolderError(f"{folder}: there is no file {path.name}.")
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
    progress = _progress(folder)
    try:
        for key, value in _read(path).items():
            part, _, name = key.partition("/")
            parts[part][name] = value
        trainee.controller.load_state_dict(parts["controller"])
        bare = progress.step == progress.skipped or trainee.controller.rewrote()
        if not (parts["optimizer"] or bare):
            raise ValueError("no moments of the optimizer")
        load_state_tensors(trainee.model, trainee.optimizer, parts["optimizer"])
        _put_back_random(parts["random"])
    except LookupError as error:
        raise FolderError(f"{path} does not fit this run: it lacks {error}.") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise FolderError(f"{path} does not fit this run: {error}.") from error
    vars(trainee.progress).update(asdict(progress))


def left_out(folder: Path) -> int:
    """How many steps in a row, its own the last, were not taken for want of a finite loss."""
    return _progress(folder).skipped_in_a_row


def _progress(folder: Path) -> Progress:
    """How far a checkpoint is, of earlier formats too."""
    given = meta(folder).progress
    if given.get("best_step") is not None:
        given = {**given, "best": [(given["best_step"], given.get("best_score"))]}
    return _typed(Progress, given, folder / "state.json")


@torch.no_grad()
def copy_into(wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor], folder: Path) -> None:
    """Copies `saved` over `wanted`, which must have the same names and shapes.

    Raises:
        FolderError: with every difference.

    """
    faults = [f"{key}: not in the checkpoint" for key in sorted(wanted.keys() - saved.keys())]
    faults += [f"{key}: not in the model" for key in sorted(saved.keys() - wanted.keys())]
    faults += resized(saved, wanted)
    if faults:
        raise FolderError(several(f"{folder} does not fit this model", faults))
    for key, value in wanted.items():
        value.copy_(saved[key])


def resized(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """A line for each tensor that has one shape in `saved` and another in `wanted`."""
    return [
        f"{key}: {tuple(saved[key].shape)} on disk, {tuple(wanted[key].shape)} in the model"
        for key in sorted(saved.keys() & wanted.keys())
        if saved[key].shape != wanted[key].shape
    ]


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
    parts = {
        "optimizer": state_tensors(trainee.model, trainee.optimizer),
        "controller": trainee.controller.state_dict(),
        "random": _random(),
    }
    return {
        f"{part}/{name}": value.contiguous()
        for part, tensors in parts.items()
        for name, value in tensors.items()
    }


def _random() -> dict[str, Tensor]:
    """The random states of this process, which dropout draws from: of the CPU, of each CUDA device
    by its number, of Apple's. Those of accelerators were never tested on one.
    """
    states = {"cpu": torch.get_rng_state()}
    states |= {str(i): state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states | ({"mps": torch.mps.get_rng_state()} if torch.mps.is_available() else {})


def _put_back_random(states: Mapping[str, Tensor]) -> None:
    """The inverse; a device that is not here is passed over: another machine may have had more."""
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name.isdecimal() and int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name))
        elif name == "mps" and torch.mps.is_available():
            torch.mps.set_rng_state(state)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As bytes, so that a full disk is an OSError as everywhere."""
    path.write_bytes(encoded(dict(tensors)))


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error
    return tensors

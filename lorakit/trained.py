"""A finished adapter, back in its base model: from a run, a checkpoint, a PEFT or packed folder."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from lorakit import checkpoint, models, packed, peft_format, variants
from lorakit import recipe as recipes
from lorakit.adapter import Adapter, Plan, VariantConfig
from lorakit.base import is_linear, widths
from lorakit.errors import FolderError, several
from lorakit.finished import PackedLinear, PlainLinear
from lorakit.inject import Layers, inject
from lorakit.models import Head, ModelSection, Precision
from lorakit.packed import PackedAdapter
from lorakit.prune import Pairs, plain
from lorakit.schema import misfits
from lorakit.sections import Recipe

CARD = "lorakit.json"
"""What a pruned folder says of where it came from."""


@dataclass(frozen=True)
class Trained:
    """A base model with a finished adapter, ready to score or to prune."""

    path: Path
    model: nn.Module
    tokenizer: Any
    layers: Layers
    whole: Mapping[str, nn.Module]
    head: Head
    base: ModelSection
    recipe: Recipe | None
    start: Mapping[str, int]
    """Ranks at the start, by module."""
    size: int
    """Bytes of adapter and head on disk."""
    scores: Mapping[str, float]
    """On the validation rows, from the run."""
    step: int | None = None
    precision: str | None = None
    """What the base was stored in when `scores` were taken."""
    card: Mapping[str, Any] | None = None
    """lorakit.json of a pruned folder."""


def open_trained(
    path: Path,
    which: str | None = None,
    precision: Precision = "fp32",
    base: str | None = None,
) -> Trained:
    """Loads what stands at `path`; `which` picks a run's checkpoint, `base` another base model.

    Raises:
        FolderError: nothing of the four stands there, or it does not fit its base.
        ModelError: the base model cannot be loaded.

    """
    for known, kind, opened in (
        (peft_format.is_adapter, "PEFT", _from_peft),
        (packed.is_packed, "packed", _from_packed),
    ):
        if known(path):
            if which is not None:
                raise FolderError(f"{path} is a {kind} folder; --checkpoint chooses within a run.")
            return opened(path, precision, base)
    return _from_checkpoint(checkpoint.find(path, which), precision, base)


def pairs_at(path: Path) -> tuple[Pairs, dict[str, dict[str, Tensor]]]:
    """The plain pairs and whole modules at `path`, to start another run from."""
    if peft_format.is_adapter(path):
        adapter = peft_format.read(path)
        return adapter.pairs, adapter.whole
    trained = open_trained(path)
    return plain(trained.layers), peft_format.tensors_of(trained.whole)


def ranks_at(path: Path) -> dict[str, int]:
    """The live ranks at `path`: those that were trained, where a run has written more."""
    if peft_format.is_adapter(path):
        return {name: pair.rank for name, pair in peft_format.read(path).pairs.items()}
    return {name: layer.rank() for name, layer in open_trained(path).layers.items()}


def with_pairs(
    base: models.Base, pairs: Pairs, whole: Mapping[str, Mapping[str, Tensor]], origin: Path
) -> Layers:
    """Puts plain pairs and whole modules into a fresh base model, in place.

    Raises:
        FolderError: a name or a shape is not the base model's; all such are listed.

    """
    shapes = {name: (len(pair.B), pair.A.shape[1]) for name, pair in pairs.items()}
    _refuse_misfits(base, shapes, whole, origin)
    plans = {name: Plan(pair.rank, 1.0, pair) for name, pair in pairs.items() if pair.rank}
    return _injected(base, plans, PlainLinear, whole, origin)


def with_codes(base: models.Base, adapter: PackedAdapter, origin: Path) -> Layers:
    """Puts coded pairs and whole modules into a fresh base model, in place.

    Raises:
        FolderError: a name or a shape is not the base model's; all such are listed.

    """
    pairs = adapter.pairs
    shapes = {name: (len(pair.B.codes), pair.A.codes.shape[1]) for name, pair in pairs.items()}
    _refuse_misfits(base, shapes, adapter.whole, origin)
    plans = {name: Plan(adapter.start[name], pair.scale) for name, pair in pairs.items()}
    by_linear = {base.model.get_submodule(name): pair for name, pair in pairs.items()}

    def layer(linear: nn.Module, config: VariantConfig, plan: Plan) -> Adapter:
        return PackedLinear(linear, config, plan, by_linear[linear])

    return _injected(base, plans, layer, adapter.whole, origin)


def _refuse_misfits(
    base: models.Base,
    shapes: Mapping[str, tuple[int, int]],
    whole: Mapping[str, Mapping[str, Tensor]],
    origin: Path,
) -> None:
    """Raises FolderError with each name and shape (m, n) that is not the base model's."""
    modules = dict(base.model.named_modules())
    faults = [
        f"{name}: no such module in the base" for name in (*shapes, *whole) if name not in modules
    ]
    for name in [name for name in shapes if name in modules]:
        if not is_linear(modules[name]):
            faults.append(f"{name}: no linear in the base")
        elif (found := widths(modules[name])[::-1]) != (given := shapes[name]):
            faults.append(
                f"{name}: the pair is {given[0]} x {given[1]}, the base {found[0]} x {found[1]}"
            )
    for name in [name for name in whole if name in modules]:
        own, saved = modules[name].state_dict(), whole[name]
        faults += [
            f"{name}.{key}: {tuple(saved[key].shape)} on disk, {tuple(own[key].shape)} in the model"
            for key in sorted(own.keys() & saved.keys())
            if own[key].shape != saved[key].shape
        ]
    if faults:
        raise FolderError(several(f"{origin} does not fit the base model", faults))


def _injected(
    base: models.Base,
    plans: Mapping[str, Plan],
    layer: Callable[[nn.Module, Any, Plan], Adapter],
    whole: Mapping[str, Mapping[str, Tensor]],
    origin: Path,
) -> Layers:
    for name, state in whole.items():
        own = base.model.get_submodule(name).state_dict()
        named = {f"{name}.{key}": value for key, value in state.items()}
        checkpoint.copy_into({f"{name}.{key}": p for key, p in own.items()}, named, origin)
    config = VariantConfig(variant="plain")
    return inject(base.model, plans, layer, config, tuple(whole), tuple(whole))


def newest_run(folder: Path) -> Path:
    """The run under `folder` that was written to last.

    Raises:
        FolderError: there is none.

    """
    runs = [p.parent for p in folder.glob("*/checkpoints") if (p / "last").is_file()]
    if not runs:
        raise FolderError(f"no run under {folder}/ yet; name a run, a checkpoint or a PEFT folder.")
    return max(runs, key=lambda run: (run / "checkpoints" / "last").stat().st_mtime_ns)


def _from_checkpoint(folder: Path, precision: Precision, other_base: str | None) -> Trained:
    recipe, meta = recipes.restore(folder), checkpoint.meta(folder)
    section = _section(recipe.model, precision, other_base)
    head = meta.task_head
    base = models.load(section, head, recipe.seed)
    plans = {name: Plan(rank, scale, fresh=False) for name, (rank, scale) in meta.plans.items()}
    variant = variants.get(recipe.adapter.variant)
    layers = inject(base.model, plans, variant.layer, recipe.adapter, meta.whole, meta.head)
    whole = {name: base.model.get_submodule(name) for name in meta.whole}
    checkpoint.load_weights(folder, layers, whole)
    size = sum((folder / f"{part}.safetensors").stat().st_size for part in ("adapter", "head"))
    return Trained(
        path=folder,
        model=base.model.eval(),
        tokenizer=base.tokenizer,
        layers=layers,
        whole=whole,
        head=head,
        base=section,
        recipe=recipe,
        start={name: rank for name, (rank, _) in meta.plans.items()},
        size=size,
        scores=meta.scores,
        step=meta.step,
        precision=meta.precision,
    )


def _from_peft(folder: Path, precision: Precision, other_base: str | None) -> Trained:
    adapter = peft_format.read(folder)
    card = _card(folder)
    recipe = recipes.restore(folder) if (folder / "recipe.yaml").is_file() else None
    named = recipe.model if recipe else ModelSection(name=adapter.base_model)
    if not named.name and other_base is None:
        raise FolderError(f"{folder} names no base model; give --base.")
    section = _section(named, precision, other_base)
    multiple = bool(card and card.get("multiple"))
    head = Head(tuple(card["labels"]) if card else _labels(adapter), adapter.task_type, multiple)
    base = models.load(section, head, seed=0)
    layers = with_pairs(base, adapter.pairs, adapter.whole, folder)
    return Trained(
        path=folder,
        model=base.model.eval(),
        tokenizer=base.tokenizer,
        layers=layers,
        whole={name: base.model.get_submodule(name) for name in adapter.whole},
        head=head,
        base=section,
        recipe=recipe,
        start={name: pair.rank for name, pair in adapter.pairs.items()},
        size=peft_format.size(folder),
        scores=card["scores"] if card else {},
        step=card["step"] if card else None,
        precision=card["precision"] if card else None,
        card=card,
    )


def _from_packed(folder: Path, precision: Precision, other_base: str | None) -> Trained:
    adapter, card = packed.read(folder), _card(folder)
    recipe = recipes.restore(folder) if (folder / "recipe.yaml").is_file() else None
    alone = ModelSection(name=adapter.base_model, revision=adapter.revision)
    section = _section(recipe.model if recipe else alone, precision, other_base)
    head = Head(adapter.labels, adapter.task_type, adapter.multiple)
    base = models.load(section, head, seed=0)
    layers = with_codes(base, adapter, folder)
    return Trained(
        path=folder,
        model=base.model.eval(),
        tokenizer=base.tokenizer,
        layers=layers,
        whole={name: base.model.get_submodule(name) for name in adapter.whole},
        head=head,
        base=section,
        recipe=recipe,
        start=adapter.start,
        size=packed.size(folder),
        scores=card["scores"] if card else {},
        step=card["step"] if card else None,
        precision=card["precision"] if card else None,
        card=card,
    )


class _Card(BaseModel):
    """What is read of lorakit.json; it holds more."""

    labels: list[str]
    scores: dict[str, float]
    step: int | None
    precision: str | None
    bytes: tuple[int, int]
    start: dict[str, int]
    ranks: dict[str, int]
    multiple: bool = False
    form: str = "plain"
    bytes_by_form: dict[str, int] = {}


def _card(folder: Path) -> dict[str, Any] | None:
    """lorakit.json of a pruned folder, null where there is none."""
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        text = path.read_bytes()
        _Card.model_validate_json(text)
        card: dict[str, Any] = json.loads(text)
    except ValidationError as error:
        raise FolderError(several(f"{path} cannot be read", misfits(error))) from None
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error
    return card


def _section(section: ModelSection, precision: Precision, other: str | None) -> ModelSection:
    changes = {"precision": precision, **({"name": other} if other else {})}
    return section.model_copy(update=changes)


def _labels(adapter: peft_format.PeftAdapter) -> tuple[str, ...]:
    """LABEL_0, LABEL_1, … as many as the saved head has outputs: its narrowest matrix."""
    matrices = [t for state in adapter.whole.values() for t in state.values() if t.ndim == 2]
    outputs = min((len(t) for t in matrices), default=0)
    labelled = adapter.task_type in (models.CLASSIFIER, "TOKEN_CLS")
    return tuple(f"LABEL_{i}" for i in range(outputs)) if labelled else ()


def logits(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """What `model` answers to `rows`, in evaluation: logits, or hidden states where it has none."""
    with torch.no_grad():
        output = model(**rows)
    answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer.float()

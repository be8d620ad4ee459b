"""A finished adapter, back in its base model: from a run, a checkpoint or a PEFT folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from lorakit import checkpoint, models, peft_format, variants
from lorakit import recipe as recipes
from lorakit.adapter import Adapter, Factors, Plan, VariantConfig, thin
from lorakit.errors import FolderError
from lorakit.inject import Layers, inject
from lorakit.models import Head, ModelSection, Precision
from lorakit.prune import Pairs, plain
from lorakit.sections import Recipe

CARD = "lorakit.json"
"""What a pruned folder says of where it came from."""


@final
class PlainLinear(Adapter):
    """dW = B A, whatever learned it."""

    A: Tensor
    B: Tensor

    def __init__(self, base: nn.Module, config: VariantConfig, plan: Plan) -> None:
        super().__init__(base, config, plan)
        assert plan.start is not None
        self.register_buffer("A", plan.start.A)
        self.register_buffer("B", plan.start.B)

    def update(self, x: Tensor) -> Tensor:
        return thin(x, self.A, self.B)

    def factors(self) -> Factors:
        return Factors(self.A, self.B)


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
        FolderError: nothing of the three stands there, or it does not fit its base.
        ModelError: the base model cannot be loaded.

    """
    if peft_format.is_adapter(path):
        if which is not None:
            raise FolderError(f"{path} is a PEFT folder; --checkpoint chooses within a run.")
        return _from_peft(path, precision, base)
    return _from_checkpoint(checkpoint.find(path, which), precision, base)


def pairs_at(path: Path) -> tuple[Pairs, dict[str, dict[str, Tensor]]]:
    """The plain pairs and whole modules at `path`, to start another run from."""
    if peft_format.is_adapter(path):
        adapter = peft_format.read(path)
        return adapter.pairs, adapter.whole
    trained = open_trained(path)
    return plain(trained.layers), peft_format.tensors_of(trained.whole)


def with_pairs(
    base: models.Base, pairs: Pairs, whole: Mapping[str, Mapping[str, Tensor]], origin: Path
) -> Layers:
    """Puts plain pairs and whole modules into a fresh base model, in place.

    Raises:
        FolderError: a name or a shape is not the base model's; all such are listed.

    """
    modules = dict(base.model.named_modules())
    faults = [
        f"{name}: no such module in the base" for name in (*pairs, *whole) if name not in modules
    ]
    plans = {name: Plan(pair.rank, 1.0, pair) for name, pair in pairs.items() if pair.rank}
    config = VariantConfig(variant="plain")
    if faults:
        raise FolderError("\n  ".join([f"{origin} does not fit the base model:", *faults]))
    for name, state in whole.items():
        own = modules[name].state_dict()
        named = {f"{name}.{key}": value for key, value in state.items()}
        checkpoint.copy_into({f"{name}.{key}": p for key, p in own.items()}, named, origin)
    layers = inject(base.model, plans, PlainLinear, config, tuple(whole), tuple(whole))
    for name, layer in layers.items():
        found, given = (layer.m, layer.n), (pairs[name].B.shape[0], pairs[name].A.shape[1])
        if found != given:
            faults.append(
                f"{name}: the pair is {given[0]} x {given[1]}, the base {found[0]} x {found[1]}"
            )
    if faults:
        raise FolderError("\n  ".join([f"{origin} does not fit the base model:", *faults]))
    return layers


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
    head = Head(meta.labels)
    base = models.load(section, head, recipe.seed)
    plans = {name: Plan(rank, scale) for name, (rank, scale) in meta.plans.items()}
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
    card = json.loads((folder / CARD).read_text()) if (folder / CARD).is_file() else None
    recipe = recipes.restore(folder) if (folder / "recipe.yaml").is_file() else None
    named = recipe.model if recipe else ModelSection(name=adapter.base_model)
    if not named.name and other_base is None:
        raise FolderError(f"{folder} names no base model; give --base.")
    section = _section(named, precision, other_base)
    head = Head(tuple(card["labels"]) if card else _labels(adapter), adapter.task_type)
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


def _section(section: ModelSection, precision: Precision, other: str | None) -> ModelSection:
    changes = {"precision": precision, **({"name": other} if other else {})}
    return section.model_copy(update=changes)


def _labels(adapter: peft_format.PeftAdapter) -> tuple[str, ...]:
    """LABEL_0, LABEL_1, … as many as the saved head has outputs: its narrowest matrix."""
    matrices = [t for state in adapter.whole.values() for t in state.values() if t.ndim == 2]
    outputs = min((len(t) for t in matrices), default=0)
    classifier = adapter.task_type == models.CLASSIFIER
    return tuple(f"LABEL_{i}" for i in range(outputs)) if classifier else ()


def logits(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """What `model` answers to `rows`, in evaluation: logits, or hidden states where it has none."""
    with torch.no_grad():
        output = model(**rows)
    answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer.float()

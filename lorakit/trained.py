"""A finished adapter, back in its base model: from a run, a checkpoint, a PEFT or packed folder."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from lorakit import checkpoint, models, packed, peft_format, run_folder, seal, variants
from lorakit import recipe as recipes
from lorakit.adapter import Plan
from lorakit.errors import FolderError, several
from lorakit.fitting import with_codes, with_pairs
from lorakit.inject import Layers, inject
from lorakit.models import ModelSection, Precision, fingerprint
from lorakit.models.fingerprint import Fingerprint
from lorakit.models.heads import CLASSIFIER, Head
from lorakit.peft_config import CONFIG
from lorakit.prune import Pairs, plain
from lorakit.schema import misfits
from lorakit.sections import Recipe

CARD = "lorakit.json"
"""What a pruned folder says of where it came from."""
FILES = (CONFIG, peft_format.WEIGHTS, packed.HEADER, packed.WEIGHTS, CARD, "recipe.yaml")
"""All that is read of a finished adapter's folder, whichever kind it is of."""


class Card(BaseModel):
    """What is read of lorakit.json; it holds more."""

    labels: list[str]
    scores: dict[str, float]
    step: int | None
    precision: str | None
    bytes: tuple[int, int]
    """Of the weight files, before and after pruning, head included."""
    start: dict[str, int]
    ranks: dict[str, int]
    multiple: bool = False
    form: str = "plain"
    bytes_by_form: dict[str, int] = {}
    base: Fingerprint | None = None
    """Of the base model that it was trained over."""
    origins: dict[str, str | None] = {}
    """Of the rows that it was trained on."""


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
    max_tokens: int
    """The longest sequence that the base has positions for."""
    fingerprint: Fingerprint
    """Of the base that it was trained over, as far as that is known."""
    scores: Mapping[str, float]
    """On the validation rows, from the run."""
    step: int | None = None
    precision: str | None = None
    """What the base was stored in when `scores` were taken."""
    card: Card | None = None
    """lorakit.json of a pruned folder."""
    origins: Mapping[str, str | None] = field(default_factory=dict)
    """What tells the rows that it was trained on from others, by setting or file."""
    warnings: tuple[str, ...] = ()
    """What a person must know of how it was opened."""


def open_trained(
    path: Path,
    which: str | None = None,
    precision: Precision = "fp32",
    base: str | None = None,
    force: bool = False,
) -> Trained:
    """Loads what stands at `path`; `which` picks a run's checkpoint, `base` another base model.

    Over a base of other weights than it was trained over it is opened with `force` alone.

    Raises:
        FolderError: nothing of the four stands there, it was changed since lorakit wrote it, or it
            does not fit its base.
        ModelError: the base model cannot be loaded.

    """
    for known, kind, read in (
        (peft_format.is_adapter, "PEFT", _in_peft),
        (packed.is_packed, "packed", _in_packed),
    ):
        if known(path):
            if which is not None:
                raise FolderError(f"{path} is a {kind} folder; --checkpoint chooses within a run.")
            return _from_folder(path, read, precision, base, force)
    return _from_checkpoint(run_folder.find(path, which), precision, base, force)


def pairs_at(path: Path) -> tuple[Pairs, dict[str, dict[str, Tensor]]]:
    """The plain pairs and whole modules at `path`, to start another run from."""
    if peft_format.is_adapter(path):
        seal.check(path)
        adapter = peft_format.read(path)
        return adapter.pairs, adapter.whole
    trained = open_trained(path)
    return plain(trained.layers), peft_format.tensors_of(trained.whole)


def ranks_at(path: Path) -> dict[str, int]:
    """The live ranks at `path`: those that were trained, where a run has written more."""
    if peft_format.is_adapter(path):
        seal.check(path)
        return {name: pair.rank for name, pair in peft_format.read(path).pairs.items()}
    return {name: layer.rank() for name, layer in open_trained(path).layers.items()}


def _from_checkpoint(
    folder: Path, precision: Precision, other_base: str | None, force: bool
) -> Trained:
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
        max_tokens=base.max_tokens,
        fingerprint=meta.base or base.fingerprint,
        scores=meta.scores,
        step=meta.step,
        precision=meta.precision,
        origins=meta.origins,
        warnings=_of_base(folder, meta.base, base, force),
    )


class Finished(NamedTuple):
    """What a PEFT or a packed folder holds, before there is a model to put it into."""

    base: ModelSection
    """As the folder itself names it."""
    head: Head
    put: Callable[[models.Base], Layers]
    """Puts it into a model fresh from disk."""
    whole: Iterable[str]
    start: Mapping[str, int]
    size: int


def _in_peft(folder: Path, card: Card | None) -> Finished:
    adapter = peft_format.read(folder)
    labels = tuple(card.labels) if card else _labels(adapter)
    return Finished(
        base=ModelSection(name=adapter.base_model),
        head=Head(labels, adapter.task_type, card.multiple if card else False),
        put=lambda base: with_pairs(base, adapter.pairs, adapter.whole, folder),
        whole=adapter.whole,
        start={name: pair.rank for name, pair in adapter.pairs.items()},
        size=peft_format.size(folder),
    )


def _in_packed(folder: Path, card: Card | None) -> Finished:
    adapter = packed.read(folder)
    return Finished(
        base=ModelSection(name=adapter.base_model, revision=adapter.revision),
        head=Head(adapter.labels, adapter.task_type, adapter.multiple),
        put=lambda base: with_codes(base, adapter, folder),
        whole=adapter.whole,
        start=adapter.start,
        size=packed.size(folder),
    )


def _from_folder(
    folder: Path,
    read: Callable[[Path, Card | None], Finished],
    precision: Precision,
    other_base: str | None,
    force: bool,
) -> Trained:
    seal.check(folder)
    card = _card(folder)
    trained_over = card.base if card else None
    found = read(folder, card)
    recipe = recipes.restore(folder) if (folder / "recipe.yaml").is_file() else None
    named = recipe.model if recipe else found.base
    if not named.name and other_base is None:
        raise FolderError(f"{folder} names no base model; give --base.")
    section = _section(named, precision, other_base)
    base = models.load(section, found.head, seed=0)
    layers = found.put(base)
    return Trained(
        path=folder,
        model=base.model.eval(),
        tokenizer=base.tokenizer,
        layers=layers,
        whole={name: base.model.get_submodule(name) for name in found.whole},
        head=found.head,
        base=section,
        recipe=recipe,
        start=found.start,
        size=found.size,
        max_tokens=base.max_tokens,
        fingerprint=trained_over or base.fingerprint,
        scores=card.scores if card else {},
        step=card.step if card else None,
        precision=card.precision if card else None,
        card=card,
        origins=card.origins if card else {},
        warnings=_of_base(folder, trained_over, base, force),
    )


def _of_base(
    origin: Path, trained_over: Fingerprint | None, base: models.Base, force: bool
) -> tuple[str, ...]:
    """What is to be said of the base; FolderError where it is another one, but for `force`."""
    remedy = None if force else "Name the right one by --base"
    return fingerprint.refuse_other(origin, trained_over, base.fingerprint, remedy)


def _card(folder: Path) -> Card | None:
    """lorakit.json of a pruned folder, null where there is none."""
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise FolderError(several(f"{path} cannot be read", misfits(error))) from None
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error}.") from error


def _section(section: ModelSection, precision: Precision, other: str | None) -> ModelSection:
    changes = {"precision": precision, **({"name": other} if other else {})}
    return section.model_copy(update=changes)


def _labels(adapter: peft_format.PeftAdapter) -> tuple[str, ...]:
    """LABEL_0, LABEL_1, … as many as the saved head has outputs: its narrowest matrix."""
    matrices = [t for state in adapter.whole.values() for t in state.values() if t.ndim == 2]
    outputs = min((len(t) for t in matrices), default=0)
    labelled = adapter.task_type in (CLASSIFIER, "TOKEN_CLS")
    return tuple(f"LABEL_{i}" for i in range(outputs)) if labelled else ()


def logits(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """What `model` answers to `rows`, in evaluation: logits, or hidden states where it has none."""
    with torch.no_grad():
        output = model(**rows)
    answer: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return answer.float()

"""Writes a finished adapter as a PEFT folder, and proves it before it is called done."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from lorakit import models, peft_format
from lorakit import recipe as recipes
from lorakit.card import Pruned, card, provenance
from lorakit.disk import refuse_existing, whole_folder
from lorakit.errors import LorakitError
from lorakit.models import Head
from lorakit.peft_format import PeftAdapter
from lorakit.prune import Pairs, Selection, check, cut, padded, plain
from lorakit.trained import CARD, Trained, logits, with_pairs

Layout = Literal["pattern", "uniform"]
TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest logit or 1, in float32."""


def default_out(source: Path) -> Path:
    """`pruned` within a run or an adapter folder; beside the steps, for a checkpoint in a run."""
    inside_run = (
        source.parent.name == "checkpoints" and (source.parent.parent / "recipe.yaml").is_file()
    )
    return (source.parent.parent if inside_run else source) / "pruned"


def export(trained: Trained, out: Path, selection: Selection, layout: Layout = "pattern") -> Pruned:
    """Writes `trained` to `out`: pairs, head, tokenizer, model card, provenance.

    Raises:
        FolderError: `out` exists or cannot be written.
        LorakitError: the selection is out of range; or the folder, read back into a fresh base,
            does not answer as it should, in which case nothing is left.

    """
    check(selection)
    refuse_existing(out, "Choose another with --out.")
    rows = models.probe(trained.model)
    before = logits(trained.model, rows)
    exact = plain(trained.layers)
    result = cut(exact, selection, trained.start)
    written = padded(result.pairs) if layout == "uniform" else result.pairs
    adapter = PeftAdapter(
        written,
        peft_format.tensors_of(trained.whole),
        models.resolve(trained.base.name),
        trained.head.kind,
    )
    with whole_folder(out) as folder:
        peft_format.write(folder, adapter)
        trained.tokenizer.save_pretrained(folder)
        if trained.recipe is not None:
            (folder / "recipe.yaml").write_text(recipes.dump(trained.recipe), encoding="utf-8")
        after = _reloaded(trained, folder)
        expected = before if not selection.lossy else _in_memory(trained, result.pairs)
        pruned = Pruned(
            out=out,
            source=trained.path,
            start=dict(trained.start),
            ranks={name: result.pairs[name].rank for name in trained.start},
            parameters=(_at_start(trained), sum(p.parameters for p in written.values())),
            size=(trained.size, peft_format.size(folder)),
            error=result.error,
            difference=_largest(after, expected),
            shift=_largest(after, before),
            limits=limits(result.pairs, trained.whole, layout),
        )
        _refuse_wrong(pruned, expected)
        facts = provenance(trained, pruned, selection)
        (folder / CARD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card(trained, pruned), encoding="utf-8")
    return pruned


def limits(pairs: Pairs, whole: Mapping[str, Any], layout: Layout) -> tuple[str, ...]:
    """What is known of readers other than PEFT."""
    ranks = {pair.rank for pair in pairs.values() if pair.rank}
    said = []
    if not ranks:
        said.append("no rank is left: one module of rank 1 with B = 0 is kept, which PEFT needs")
    if whole:
        said.append(f"vLLM refuses adapters with trained modules ({', '.join(whole)})")
    if layout == "pattern" and len(ranks) > 1:
        said.append(
            "llama.cpp scales each tensor by alpha over its own rank, which mixed ranks break: "
            "write --layout uniform for it"
        )
    if ranks and not whole:
        said.append(f"vLLM wants --max-lora-rank of at least {max(ranks)}")
    return tuple(said)


def _at_start(trained: Trained) -> int:
    return sum(
        rank * (trained.layers[name].n + trained.layers[name].m)
        for name, rank in trained.start.items()
    )


def _fresh(trained: Trained) -> models.Base:
    head = Head(trained.head.labels, trained.head.kind)
    return models.load(trained.base, head, seed=0)


def _reloaded(trained: Trained, folder: Path) -> torch.Tensor:
    """The answers of a base model fresh from disk with the adapter just written."""
    base, adapter = _fresh(trained), peft_format.read(folder)
    with_pairs(base, adapter.pairs, adapter.whole, folder)
    return logits(base.model.eval(), models.probe(base.model))


def _in_memory(trained: Trained, pairs: Pairs) -> torch.Tensor:
    """The answers with pairs that were never on disk."""
    base = _fresh(trained)
    with_pairs(base, pairs, peft_format.tensors_of(trained.whole), trained.path)
    return logits(base.model.eval(), models.probe(base.model))


def _largest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _refuse_wrong(pruned: Pruned, expected: torch.Tensor) -> None:
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not pruned.difference <= allowed:
        raise LorakitError(
            f"{pruned.out}: read back, its logits differ by {pruned.difference:.2g}, more than "
            f"{allowed:.2g}. Nothing was written. This is a fault of lorakit's: please report it."
        )

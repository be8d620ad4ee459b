"""Writes a finished adapter as a PEFT or a packed folder, and proves it before calling it done."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from lorakit import bops, models, packed, peft_format
from lorakit import recipe as recipes
from lorakit.bops import Costs
from lorakit.card import Pruned, card, provenance
from lorakit.codes import CodedPair
from lorakit.disk import refuse_existing, whole_folder
from lorakit.errors import LorakitError, NotCodedError, NotLowRankError
from lorakit.packed import PackedAdapter
from lorakit.peft_format import PeftAdapter
from lorakit.prune import Pairs, Selection, check, cut, padded, plain
from lorakit.trained import CARD, Trained, logits, with_codes, with_pairs

Layout = Literal["pattern", "uniform"]
TOLERANCE = 1e-4
"""Largest accepted difference of logits, relative to the largest logit or 1, in float32."""


def default_out(source: Path, name: str = "pruned") -> Path:
    """`name` within a run or an adapter folder; beside the steps, for a checkpoint in a run."""
    inside_run = (
        source.parent.name == "checkpoints" and (source.parent.parent / "recipe.yaml").is_file()
    )
    return (source.parent.parent if inside_run else source) / name


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
    adapter = _as_peft(trained, padded(result.pairs) if layout == "uniform" else result.pairs)
    coded = None if selection.lossy else _codes(trained)
    with whole_folder(out) as folder:
        peft_format.write(folder, adapter)
        _write_beside(trained, folder)
        after = _reloaded(trained, folder)
        expected = before if not selection.lossy else _in_memory(trained, result.pairs)
        size = peft_format.size(folder)
        forms = {} if coded is None else {"plain": size, "packed": _packed_size(trained, coded)}
        pruned = Pruned(
            out=out,
            source=trained.path,
            start=dict(trained.start),
            ranks={name: result.pairs[name].rank for name in trained.start},
            parameters=(_at_start(trained), sum(p.parameters for p in adapter.pairs.values())),
            size=(trained.size, size),
            error=result.error,
            difference=_largest(after, expected),
            shift=_largest(after, before),
            limits=limits(result.pairs, trained.whole, layout),
            forms=forms,
            costs=_costs(trained, coded),
        )
        _refuse_wrong(pruned, TOLERANCE * max(1.0, float(expected.abs().max())))
        _describe(trained, pruned, selection, folder)
    return pruned


def pack(trained: Trained, out: Path) -> Pruned:
    """Writes `trained` to `out` as integer codes at the bits they were learned with.

    Raises:
        NotCodedError: its numbers are no codes.
        FolderError: `out` exists or cannot be written.
        LorakitError: the folder, read back into a fresh base, does not answer the very same; then
            nothing is left.

    """
    refuse_existing(out, "Choose another with --out.")
    pairs = {name: layer.coded() for name, layer in trained.layers.items()}
    before = logits(trained.model, models.probe(trained.model))
    with whole_folder(out) as folder:
        packed.write(folder, _as_packed(trained, pairs))
        _write_beside(trained, folder)
        base, found = _fresh(trained), packed.read(folder)
        with_codes(base, found, folder)
        after = logits(base.model.eval(), models.probe(base.model))
        size, plain_size = packed.size(folder), _plain_size(trained)
        pruned = Pruned(
            out=out,
            source=trained.path,
            start=dict(trained.start),
            ranks={name: pairs[name].rank for name in trained.start},
            parameters=(_at_start(trained), sum(pair.parameters for pair in pairs.values())),
            size=(trained.size, size),
            error=0.0,
            difference=_largest(after, before),
            shift=_largest(after, before),
            limits=("only lorakit reads packed folders",),
            form="packed",
            forms={"packed": size} | ({} if plain_size is None else {"plain": plain_size}),
            costs=_costs(trained, pairs),
        )
        _refuse_wrong(pruned, 0.0)
        _describe(trained, pruned, Selection(), folder)
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


def _as_peft(trained: Trained, pairs: Pairs) -> PeftAdapter:
    whole, name = peft_format.tensors_of(trained.whole), models.resolve(trained.base.name)
    return PeftAdapter(pairs, whole, name, trained.head.kind)


def _as_packed(trained: Trained, pairs: dict[str, CodedPair]) -> PackedAdapter:
    start, whole = dict(trained.start), peft_format.tensors_of(trained.whole)
    base, head = trained.base, trained.head
    return PackedAdapter(pairs, start, whole, base.name, base.revision, *head)


def _codes(trained: Trained) -> dict[str, CodedPair] | None:
    """The codes of every layer; null where the numbers are none."""
    try:
        return {name: layer.coded() for name, layer in trained.layers.items()}
    except NotCodedError:
        return None


def _costs(trained: Trained, pairs: dict[str, CodedPair] | None) -> Costs | None:
    if pairs is None:
        return None
    widths = {name: (layer.n, layer.m) for name, layer in trained.layers.items()}
    return bops.costs(pairs, widths, trained.start)


def _packed_size(trained: Trained, pairs: dict[str, CodedPair]) -> int:
    return sum(map(len, packed.encode(_as_packed(trained, pairs)).values()))


def _plain_size(trained: Trained) -> int | None:
    """Bytes of the weights as PEFT's folder; null where no plain pair does what a layer does."""
    try:
        adapter = _as_peft(trained, plain(trained.layers))
    except NotLowRankError:
        return None
    with TemporaryDirectory() as folder:
        peft_format.write(Path(folder), adapter)
        return peft_format.size(Path(folder))


def _write_beside(trained: Trained, folder: Path) -> None:
    """Tokenizer and recipe."""
    trained.tokenizer.save_pretrained(folder)
    if trained.recipe is not None:
        (folder / "recipe.yaml").write_text(recipes.dump(trained.recipe), encoding="utf-8")


def _describe(trained: Trained, pruned: Pruned, selection: Selection, folder: Path) -> None:
    """Provenance and model card."""
    facts = provenance(trained, pruned, selection)
    (folder / CARD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(trained, pruned), encoding="utf-8")


def _at_start(trained: Trained) -> int:
    return sum(
        rank * (trained.layers[name].n + trained.layers[name].m)
        for name, rank in trained.start.items()
    )


def _fresh(trained: Trained) -> models.Base:
    return models.load(trained.base, trained.head, seed=0)


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


def _refuse_wrong(pruned: Pruned, allowed: float) -> None:
    if not pruned.difference <= allowed:
        raise LorakitError(
            f"{pruned.out}: read back, its logits differ by {pruned.difference:.2g}, more than "
            f"{allowed:.2g}. Nothing was written. This is a fault of lorakit's: please report it."
        )

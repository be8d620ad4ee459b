"""Writes a finished adapter as a PEFT or a packed folder, and proves it before calling it done."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from lorakit import bops, gguf_format, models, packed, peft_format, seal
from lorakit import recipe as recipes
from lorakit.bops import Costs
from lorakit.card import Pruned, card, provenance
from lorakit.codes import CodedPair
from lorakit.disk import refuse_existing, whole_file, whole_folder
from lorakit.errors import LorakitError, NotCodedError, NotLowRankError
from lorakit.fitting import with_codes, with_pairs
from lorakit.packed import PackedAdapter
from lorakit.peft_format import PeftAdapter
from lorakit.prune import Pairs, Selection, check, cut, padded, plain
from lorakit.trained import CARD, FILES, Trained, logits

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
        write_beside(trained, folder)
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
            difference=largest(after, expected),
            shift=largest(after, before),
            limits=limits(result.pairs, trained.whole, layout),
            forms=forms,
            costs=_costs(trained, coded),
        )
        refuse_wrong(f"{out}: read back", pruned.difference, tolerance(expected))
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
        write_beside(trained, folder)
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
            difference=largest(after, before),
            shift=largest(after, before),
            limits=("only lorakit reads packed folders",),
            form="packed",
            forms={"packed": size} | ({} if plain_size is None else {"plain": plain_size}),
            costs=_costs(trained, pairs),
        )
        refuse_wrong(f"{out}: read back", pruned.difference, 0.0)
        _describe(trained, pruned, Selection(), folder)
    return pruned


@dataclass(frozen=True)
class Converted:
    """An adapter file of llama.cpp's, and how it compares with what it was written from."""

    out: Path
    source: Path
    linears: int
    """How many have a pair in it."""
    ranks: int
    size: int
    """In bytes."""
    difference: float
    """Largest entry by which an update that the file holds differs from the trained one."""


def convert(trained: Trained, out: Path) -> Converted:
    """Writes `trained` to the file `out` for llama.cpp.

    Raises:
        FolderError: `out` exists or cannot be written.
        NotLowRankError: a layer has no plain pair.
        LorakitError: more than pairs was trained, llama.cpp has no place for a pair, or what is
            read back is another update; then nothing is left.

    """
    refuse_existing(out, "Choose another with --out.")
    config, pairs = cast(Any, trained.model.config), plain(trained.layers)
    _refuse_more_than_pairs(trained, pairs)
    gguf_format.check(config, list(pairs))
    with whole_file(out) as temporary:
        gguf_format.write(temporary, pairs, config)
        found = gguf_format.read(temporary, config, list(pairs))
        live = {name: pair for name, pair in pairs.items() if pair.rank}
        if found.keys() != live.keys():
            raise LorakitError(f"{out}: read back, it lacks {sorted(live.keys() - found.keys())}.")
        products = {name: (pair.B @ pair.A, found[name]) for name, pair in live.items()}
        difference = max(largest(dW, back.B @ back.A) for dW, back in products.values())
        top = max(float(dW.abs().max()) for dW, _ in products.values())
        refuse_wrong(f"{out}: read back", difference, TOLERANCE * top, "its updates")
        size = temporary.stat().st_size
    ranks = sum(pair.rank for pair in live.values())
    return Converted(out, trained.path, len(live), ranks, size, difference)


def _refuse_more_than_pairs(trained: Trained, pairs: Pairs) -> None:
    kind, whole = trained.head.kind, ", ".join(trained.whole)
    if kind != "CAUSAL_LM" or whole:
        what = f"{whole} trained whole" if whole else f"a head of kind {kind}"
        raise LorakitError(
            f"--format gguf: llama.cpp's adapters are pairs for a causal language model, and "
            f"{trained.path} has {what}. `lorakit merge` writes a whole model, which llama.cpp's "
            "own converter takes."
        )
    if not any(pair.rank for pair in pairs.values()):
        raise LorakitError(f"{trained.path} has no rank left; there is nothing to write.")


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
            "llama.cpp's converter knows one alpha for all ranks: take the file of `lorakit export "
            "--format gguf`, or --layout uniform"
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
    return len(peft_format.encode(adapter)[peft_format.WEIGHTS])


def write_beside(trained: Trained, folder: Path) -> None:
    """Tokenizer and recipe, which go along with whatever is written of an adapter."""
    trained.tokenizer.save_pretrained(folder)
    if trained.recipe is not None:
        (folder / "recipe.yaml").write_text(recipes.dump(trained.recipe), encoding="utf-8")


def _describe(trained: Trained, pruned: Pruned, selection: Selection, folder: Path) -> None:
    """Provenance, model card, and the digests of what is read again."""
    facts = provenance(trained, pruned, selection)
    (folder / CARD).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(trained, pruned), encoding="utf-8")
    seal.write(folder, FILES)


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


def largest(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two models' answers."""
    return float((one - other).abs().max())


def tolerance(answers: torch.Tensor) -> float:
    """How far other answers may be from these."""
    return TOLERANCE * max(1.0, float(answers.abs().max()))


def refuse_wrong(what: str, difference: float, allowed: float, whose: str = "its logits") -> None:
    """Raises LorakitError where the logits of `what` are not within what is `allowed`."""
    if not difference <= allowed:  # nor where it is no number
        raise LorakitError(
            f"{what}, {whose} differ by {difference:.2g}, more than {allowed:.2g}. Nothing was "
            "written. This is a fault of lorakit's: please report it."
        )

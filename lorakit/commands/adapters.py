"""What `lorakit prune`, `merge` and `export` do."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from lorakit import display
from lorakit import export as exporting
from lorakit import merge as merging
from lorakit.card import GROWN, Pruned, told
from lorakit.commands.opening import Source, opened
from lorakit.display import print_json, size
from lorakit.errors import LorakitError, one_of
from lorakit.export import Converted, Layout
from lorakit.merge import DTYPES, Merged
from lorakit.progress import Watch
from lorakit.prune import Selection, Unit
from lorakit.trained import Trained


def prune(
    source: Source,
    out: Path | None,
    cut: tuple[int | None, float | None, float | None, str | None],
    layout: str | None,
    packed: bool,
    as_json: bool,
) -> None:
    """`lorakit prune`."""
    rank, energy, keep, of = cut
    if packed:
        options = {"rank": rank, "energy": energy, "keep": keep, "of": of, "layout": layout}
        _alone("--packed", options)
    one_of("--layout", layout or "pattern", get_args(Layout))
    one_of("--of", of or "ranks", get_args(Unit))
    found = opened(source, Watch(Console(stderr=True), quiet=as_json))
    target = out or exporting.default_out(found.path, "packed" if packed else "pruned")
    if packed:
        pruned = exporting.pack(found, target)
    else:
        selection = Selection(rank, energy, keep, cast(Unit, of or "ranks"))
        pruned = exporting.export(found, target, selection, cast(Layout, layout or "pattern"))
    if as_json:
        print_json(asdict(pruned))
    else:
        _show_pruned(pruned)


def merge(
    source: Source,
    out: Path | None,
    dtype: str,
    as_json: bool,
) -> None:
    """`lorakit merge`."""
    one_of("--dtype", dtype, ("auto", *DTYPES))
    found = opened(source, Watch(Console(stderr=True), quiet=as_json))
    merged = merging.merge(found, out or exporting.default_out(found.path, "merged"), dtype)
    if as_json:
        print_json(asdict(merged))
    else:
        _show_merged(merged)


def export(
    source: Source,
    form: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """`lorakit export`."""
    one_of("--format", form, tuple(FORMATS))
    found = opened(source, Watch(Console(stderr=True), quiet=as_json))
    write, name, show = FORMATS[form]
    written = write(found, out or exporting.default_out(found.path, name))
    if as_json:
        print_json(asdict(written))
    else:
        show(written)


def _show_converted(converted: Converted) -> None:
    out = Console(highlight=False, markup=False)
    rows = [
        ("written", f"{converted.out}, {size(converted.size)}"),
        ("holds", f"{converted.linears} linears, {converted.ranks} ranks"),
        ("updates", f"within {converted.difference:.1g} of the trained ones, read back"),
    ]
    out.print(display.two_columns(rows))


def _show_merged(merged: Merged) -> None:
    out = Console(highlight=False, markup=False)
    rounded = f", {merged.exact:.1g} before rounding to {merged.dtype}"
    rows = [
        ("written", f"{merged.out}, {size(merged.size)} in {merged.dtype}"),
        ("of", f"{merged.source}, on {merged.base}"),
        ("merged", f"{merged.linears} linears"),
        (
            "logits",
            f"within {merged.difference:.1g} of the unmerged model's, read back by transformers"
            + rounded * (merged.dtype != "fp32"),
        ),
    ]
    out.print(display.two_columns(rows))


def _show_pruned(pruned: Pruned) -> None:
    out = Console(highlight=False, markup=False)
    out.print(display.rank_table(pruned.start, pruned.ranks))
    rows = [
        display.ranks(pruned.start, pruned.ranks),
        ("adapter parameters", f"{pruned.parameters[0]:,}", f"{pruned.parameters[1]:,}"),
        ("size with head", size(pruned.size[0]), size(pruned.size[1])),
    ]
    if pruned.costs is not None:
        out.print(display.cost_table(pruned.costs, pruned.ranks))
        for sentence in told(pruned.costs):
            out.print(sentence)
    out.print(display.before_after(rows, f"{pruned.source.name} -> {pruned.out}"))
    for form, count in pruned.forms.items():
        if form != pruned.form:
            out.print(f"Written {form}, it would take {size(count)} with the head.")
    if pruned.error:
        out.print(f"Relative error of the update {pruned.error:.3g}.")
        out.print(f"Logits moved by up to {pruned.shift:.2g}.")
    same = f"logits within {pruned.difference:.1g}" if pruned.difference else "the same logits"
    out.print(f"Read back into a fresh base model: {same}.")
    for note in (*((GROWN,) if pruned.grown else ()), *pruned.limits):
        out.print(f"· {note}")


FORMATS: Mapping[str, tuple[Callable[[Trained, Path], Any], str, Callable[[Any], None]]] = {
    "peft": (lambda found, out: exporting.export(found, out, Selection()), "pruned", _show_pruned),
    "gguf": (exporting.convert, "adapter.gguf", _show_converted),
}
"""By name: what writes it, its own name, and what shows the result."""


def _alone(option: str, others: dict[str, Any]) -> None:
    """Refuses options that say nothing beside `option`."""
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if given:
        raise LorakitError(
            f"{option} writes codes as they are and takes no {', '.join(given)}; for a smaller "
            f"plain adapter leave {option} out."
        )

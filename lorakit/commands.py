"""What each command does: calls the rooms below, and shows or prints what they answer."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from lorakit import display, export, plots, recipe, report, run, shipped, tasks, trained, variants
from lorakit.card import GROWN, Pruned, told
from lorakit.disk import write_text
from lorakit.display import size
from lorakit.errors import FolderError, LorakitError, nearest
from lorakit.evaluate import Scored, Wanted, score
from lorakit.export import Layout
from lorakit.models import Precision
from lorakit.prune import Selection, Unit
from lorakit.trained import Trained

RUNS = Path("runs")
"""Where `eval` looks for the newest run."""


def train(path: Path, overrides: list[str], resume: bool, as_json: bool) -> None:
    """`lorakit train`."""
    loaded = recipe.load(_recipe_file(path), overrides)
    with display.Watch(Console(stderr=True), quiet=as_json) as watch:
        outcome = run.run(loaded, resume, watch)
    if outcome is None:  # another process answers
        return
    ends = report.stage_ends(outcome.run)
    if ends:
        plots.stage_curve(ends, outcome.start, outcome.run / "stages.png")
    if as_json:
        _print_json({**asdict(outcome), "stages": [end._asdict() for end in ends]})
        return
    if ends:
        Console().print(display.stage_table(ends, outcome.start))
    best = f", best at {outcome.best_step:,}" if outcome.best_step else ""
    rows = [
        ("run", str(outcome.run)),
        ("steps", f"{outcome.step:,}{best}"),
        ("scores", display.scores(outcome.scores)),
        ("ranks", f"{outcome.live} of {outcome.start} live"),
        *([("picture", str(outcome.run / "stages.png"))] if ends else []),
        ("next", f"lorakit {_next(loaded.adapter.variant)} {outcome.run}"),
    ]
    Console().print(display.two_columns(rows))


def dry_run(path: Path, overrides: list[str], as_json: bool) -> None:
    """`lorakit train --dry-run`."""
    loaded = recipe.load(_recipe_file(path), overrides)
    prepared = run.check(loaded)
    memory, labels = prepared.memory(), prepared.task.head().labels
    ranks = {name: planned.rank for name, planned in prepared.plans.items()}
    counts = {split: prepared.task.rows(split) for split in ("train", "validation")}
    if as_json:
        facts = {
            "rows": counts,
            "labels": labels,
            "head": prepared.base.head,
            "ranks": ranks,
            "trainable": prepared.trainable(),
            "steps": prepared.timetable.steps,
            "memory": memory._asdict(),
            "notes": prepared.notes,
        }
        _print_json({**facts, "recipe": loaded.model_dump(mode="json")})
        return
    watch = display.Watch(Console(stderr=True))
    for note in prepared.notes:
        watch.note(note)
    rows = [
        ("rows", ", ".join(f"{split} {count:,}" for split, count in counts.items())),
        ("labels", f"{len(labels)}: {', '.join(labels)}"),
        ("head", ", ".join(prepared.base.head)),
        ("adapted", f"{len(ranks)} linears, {sum(ranks.values()):,} ranks"),
        ("trainable", f"{prepared.trainable():,} parameters"),
        ("steps", f"{prepared.timetable.steps:,}"),
        (
            "memory",
            f"about {size(sum(memory))}: base {size(memory.base)}, trained {size(memory.trained)}, "
            f"activations {size(memory.activations)}",
        ),
    ]
    Console().print(display.two_columns(rows))
    print(f"\n{recipe.dump(loaded)}", end="")


def prune(
    path: Path,
    out: Path | None,
    cut: tuple[int | None, float | None, float | None, str | None],
    layout: str | None,
    packed: bool,
    which: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """`lorakit prune`."""
    rank, energy, keep, of = cut
    if packed:
        options = {"rank": rank, "energy": energy, "keep": keep, "of": of, "layout": layout}
        _alone("--packed", options)
    _one_of("--layout", layout or "pattern", get_args(Layout))
    _one_of("--of", of or "ranks", get_args(Unit))
    found = trained.open_trained(path, which, base=base)
    target = out or export.default_out(found.path, "packed" if packed else "pruned")
    if packed:
        pruned = export.pack(found, target)
    else:
        selection = Selection(rank, energy, keep, cast(Unit, of or "ranks"))
        pruned = export.export(found, target, selection, cast(Layout, layout or "pattern"))
    if as_json:
        _print_json(asdict(pruned))
    else:
        _show_pruned(pruned)


def evaluate(
    path: Path | None,
    wanted: Wanted,
    precision: str,
    output_path: Path | None,
    which: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """`lorakit eval`."""
    _one_of("--precision", precision, get_args(Precision))
    if wanted.task is not None:
        _one_of("--task", wanted.task, tuple(tasks.names()))
    if output_path is not None and (output_path.is_dir() or not output_path.parent.is_dir()):
        raise FolderError(f"--output-path: {output_path}: expected a file in a folder that exists.")
    watch = display.Watch(Console(stderr=True), quiet=as_json)
    if path is None:
        path = trained.newest_run(RUNS)
        watch.note(f"the newest run: {path}")
    found = trained.open_trained(path, which, cast(Precision, precision), base)
    scored = score(found, wanted, precision)
    for note in scored.notes:
        watch.note(note)
    result = {**asdict(scored), "step": found.step}
    if output_path is not None:
        write_text(output_path, json.dumps(result, indent=2, default=str) + "\n")
    if as_json:
        _print_json(result)
    else:
        _show_scored(scored, found, whole=wanted.limit is None)


def schema() -> None:
    """`lorakit schema`."""
    _print_json(recipe.json_schema())


def list_recipes(as_json: bool) -> None:
    """`lorakit recipes list`."""
    found = {name: shipped.summary(path) for name, path in shipped.recipes().items()}
    if as_json:
        _print_json(found)
    else:
        Console().print(display.two_columns(list(found.items())))


def _show_pruned(pruned: Pruned) -> None:
    out = Console(highlight=False, markup=False)
    out.print(display.rank_table(pruned.start, pruned.ranks))
    rows = [
        _ranks(pruned.start, pruned.ranks),
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


def _show_scored(scored: Scored, found: Trained, whole: bool) -> None:
    out = Console(highlight=False, markup=False)
    title = f"{scored.path} on {scored.task}, {scored.split}, {scored.rows:,} rows"
    written = {name: display.score(name, value) for name, value in scored.scores.items()}
    own = found.recipe is not None and found.recipe.task.name == scored.task
    if found.card is None or not (own and whole and scored.split == "validation"):
        out.print(title)
        out.print(display.two_columns([*written.items(), ("precision", scored.precision)]))
        return
    before = {name: display.score(name, value) for name, value in found.scores.items()}
    full, pruned = found.card["bytes"]
    rows = [
        *((name, before[name], value) for name, value in written.items() if name in before),
        _ranks(found.card["start"], found.card["ranks"]),
        ("adapter size", size(full), size(pruned)),
        *_other_forms(found.card),
        ("scored in", f"{found.precision}, by the run", f"{scored.precision}, reloaded"),
    ]
    out.print(display.before_after(rows, title))


def _next(variant: str) -> str:
    """What is done with a finished run: a full-rank update can only be scored."""
    return "prune" if variants.get(variant).promises.low_rank else "eval"


def _ranks(start: dict[str, int], ranks: dict[str, int]) -> tuple[str, str, str]:
    kept, of = sum(ranks.values()), sum(start.values())
    return ("ranks", f"{of}", f"{kept} ({kept / of:.0%})")


def _other_forms(card: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The size a folder of codes would have in float32, and the other way round."""
    forms = card.get("bytes_by_form", {})
    return [(f"size if {form}", "", size(n)) for form, n in forms.items() if form != card["form"]]


def _recipe_file(path: Path) -> Path:
    """A run folder stands for its own recipe."""
    return path / "recipe.yaml" if path.is_dir() else path


def _one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        expected = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise LorakitError(f"{option}: {given!r}: expected {expected}.{nearest(given, known)}")


def _alone(option: str, others: dict[str, Any]) -> None:
    """Refuses options that say nothing beside `option`."""
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if given:
        raise LorakitError(
            f"{option} writes codes as they are and takes no {', '.join(given)}; for a smaller "
            f"plain adapter leave {option} out."
        )


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))

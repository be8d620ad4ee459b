"""What each command does: calls the rooms below, and shows or prints what they answer."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console

from lorakit import display, export, recipe, run, shipped, tasks, trained
from lorakit.card import Pruned
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
    if as_json:
        _print_json(asdict(outcome))
        return
    best = f", best at {outcome.best_step:,}" if outcome.best_step else ""
    rows = [
        ("run", str(outcome.run)),
        ("steps", f"{outcome.step:,}{best}"),
        ("scores", display.scores(outcome.scores)),
        ("ranks", f"{outcome.live} of {outcome.start} live"),
        ("next", f"lorakit prune {outcome.run}"),
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
    cut: tuple[int | None, float | None, float | None, str],
    layout: str,
    which: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """`lorakit prune`."""
    _one_of("--layout", layout, get_args(Layout))
    _one_of("--of", cut[3], get_args(Unit))
    selection = Selection(cut[0], cut[1], cut[2], cast(Unit, cut[3]))
    found = trained.open_trained(path, which, base=base)
    target = out or export.default_out(found.path)
    pruned = export.export(found, target, selection, cast(Layout, layout))
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
    out.print(display.before_after(rows, f"{pruned.source.name} -> {pruned.out}"))
    if pruned.error:
        out.print(f"Relative error of the update {pruned.error:.3g}.")
        out.print(f"Logits moved by up to {pruned.shift:.2g}.")
    out.print(f"Read back into a fresh base model: logits within {pruned.difference:.1g}.")
    for limit in pruned.limits:
        out.print(f"· {limit}")


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
        ("scored in", f"{found.precision}, by the run", f"{scored.precision}, reloaded"),
    ]
    out.print(display.before_after(rows, title))


def _ranks(start: dict[str, int], ranks: dict[str, int]) -> tuple[str, str, str]:
    kept, of = sum(ranks.values()), sum(start.values())
    return ("ranks", f"{of}", f"{kept} ({kept / of:.0%})")


def _recipe_file(path: Path) -> Path:
    """A run folder stands for its own recipe."""
    return path / "recipe.yaml" if path.is_dir() else path


def _one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        expected = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
        raise LorakitError(f"{option}: {given!r}: expected {expected}.{nearest(given, known)}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))

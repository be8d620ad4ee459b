"""What `lorakit train` does."""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from lorakit import display, plots, progress, recipe, report, run, variants
from lorakit.display import print_json, size
from lorakit.errors import LorakitError


def train(path: Path, overrides: list[str], resume: bool, force: bool, as_json: bool) -> None:
    """`lorakit train`."""
    if force and not resume:
        raise LorakitError("--force: goes with --resume; a new run takes the base that is there.")
    loaded = recipe.load(_recipe_file(path), overrides)
    with progress.Watch(Console(stderr=True), quiet=as_json) as watch:
        outcome = run.run(loaded, resume, watch, force)
    if outcome is None:  # another process answers
        return
    ends = report.stage_ends(outcome.run)
    if ends:
        plots.stage_curve(ends, outcome.start, outcome.run / "stages.png")
    if as_json:
        print_json({**asdict(outcome), "stages": [end._asdict() for end in ends]})
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
    with progress.Watch(Console(stderr=True), quiet=as_json) as watch:
        prepared = run.check(loaded)
    for note in prepared.notes:
        watch.note(note)
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
        print_json({**facts, "recipe": loaded.model_dump(mode="json")})
        return
    rows = [
        ("rows", ", ".join(f"{split} {count:,}" for split, count in counts.items())),
        *([("labels", f"{len(labels)}: {', '.join(labels)}")] if labels else []),
        *([("head", ", ".join(prepared.base.head))] if prepared.base.head else []),
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


def _next(variant: str) -> str:
    """What is done with a finished run: a full-rank update is no small pair, only a new W."""
    return "prune" if variants.get(variant).promises.low_rank else "merge"


def _recipe_file(path: Path) -> Path:
    """A run folder stands for its own recipe."""
    return path / "recipe.yaml" if path.is_dir() else path

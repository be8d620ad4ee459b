"""What each command does: calls the rooms below, and shows or prints what they answer."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from lorakit import display, export, recipe, run, shipped, trained
from lorakit.disk import write_text
from lorakit.errors import LorakitError, nearest
from lorakit.evaluate import Scored, Wanted, score
from lorakit.export import Pruned
from lorakit.models import Precision
from lorakit.prune import Selection, Unit
from lorakit.trained import Trained

RUNS = Path("runs")


def train(path: Path, overrides: list[str], dry_run: bool, resume: bool, as_json: bool) -> None:
    """`lorakit train`."""
    file = path / "recipe.yaml" if path.is_dir() else path
    loaded = recipe.load(file, overrides)
    if dry_run:
        return _dry_run(loaded, as_json)
    with display.Watch(_error_console(), quiet=as_json) as watch:
        outcome = run.run(loaded, resume, watch)
    if as_json:
        return _print_json(asdict(outcome))
    out = _console()
    which = "best" if outcome.best_step else "last"
    out.print(
        display.two_columns(
            [
                ("run", str(outcome.run)),
                ("steps", f"{outcome.step:,}" + (f", best at {outcome.best_step:,}" if outcome.best_step else "")),
                (f"scores ({which})", _scores(outcome.scores)),
                ("ranks", f"{outcome.live} of {outcome.start} live"),
                ("next", f"lorakit prune {outcome.run}"),
            ]
        )
    )


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
    _one_of("--layout", layout, get_args(export.Layout))
    _one_of("--of", cut[3], get_args(Unit))
    selection = Selection(*cut)  # type: ignore[arg-type]
    found = trained.open_trained(path, which, base=base)
    pruned = export.export(found, out or export.default_out(found.path), selection, layout)  # type: ignore[arg-type]
    if as_json:
        _print_json(asdict(pruned))
    else:
        _show_pruned(pruned)


def evaluate(
    path: Path | None,
    wanted: tuple[str | None, str | None, str, int | None, int],
    precision: str,
    output_path: Path | None,
    which: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """`lorakit eval`."""
    _one_of("--precision", precision, get_args(Precision))
    watch = display.Watch(_error_console(), quiet=as_json)
    if path is None:
        path = trained.newest_run(RUNS)
        watch.note(f"the newest run: {path}")
    found = trained.open_trained(path, which, precision, base)  # type: ignore[arg-type]
    scored = score(found, Wanted(*wanted), precision)
    for note in scored.notes:
        watch.note(note)
    result = {**asdict(scored), "step": found.step}
    if output_path is not None:
        write_text(output_path, json.dumps(result, indent=2, default=str) + "\n")
    if as_json:
        _print_json(result)
    else:
        _show_scored(scored, found, wanted[3])


def schema() -> None:
    """`lorakit schema`."""
    _print_json(recipe.json_schema())


def list_recipes(as_json: bool) -> None:
    """`lorakit recipes list`."""
    found = {name: shipped.summary(path) for name, path in shipped.recipes().items()}
    if as_json:
        _print_json(found)
    else:
        _console().print(display.two_columns(list(found.items())))


def _dry_run(loaded: recipe.Recipe, as_json: bool) -> None:
    prepared = run.check(loaded)
    memory, parameters = prepared.memory(), prepared.trainable()
    labels = prepared.task.head().labels
    facts = {
        "rows": {split: prepared.task.rows(split) for split in ("train", "validation")},
        "labels": list(labels),
        "head": list(prepared.base.head),
        "adapted": {name: planned.rank for name, planned in prepared.plans.items()},
        "trainable": parameters,
        "steps": prepared.timetable.steps,
        "memory": {**memory._asdict(), "total": memory.total},
        "notes": list(prepared.notes),
    }
    if as_json:
        return _print_json({**facts, "recipe": loaded.model_dump(mode="json")})
    watch = display.Watch(_error_console())
    for note in prepared.notes:
        watch.note(note)
    _console().print(
        display.two_columns(
            [
                ("rows", ", ".join(f"{split} {n:,}" for split, n in facts["rows"].items())),  # type: ignore[attr-defined]
                ("labels", f"{len(labels)}: {', '.join(labels)}"),
                ("head", ", ".join(prepared.base.head)),
                ("adapted", f"{len(prepared.plans)} linears, {sum(p.rank for p in prepared.plans.values())} ranks"),
                ("trainable", f"{parameters:,} parameters"),
                ("steps", f"{prepared.timetable.steps:,}"),
                (
                    "memory",
                    f"about {display.size(memory.total)}: base {display.size(memory.base)}, trained "
                    f"{display.size(memory.trained)}, activations up to {display.size(memory.activations)}",
                ),
            ]
        )
    )
    print("\n" + recipe.dump(loaded), end="")


def _show_pruned(pruned: Pruned) -> None:
    out = _console()
    out.print(display.rank_table(pruned.start, pruned.ranks))
    kept, of = sum(pruned.ranks.values()), sum(pruned.start.values())
    rows = [
        ("ranks", f"{of}", f"{kept} ({kept / of:.0%})"),
        ("adapter parameters", f"{pruned.parameters[0]:,}", f"{pruned.parameters[1]:,}"),
        ("size with head", display.size(pruned.size[0]), display.size(pruned.size[1])),
    ]
    out.print(display.before_after(rows, f"{pruned.source.name} -> {pruned.out}"))
    if pruned.error:
        out.print(
            f"Relative error of the update {pruned.error:.3g}; logits moved by up to {pruned.shift:.2g}."
        )
    out.print(
        f"Read back into a fresh base model: logits differ by at most {pruned.difference:.1g}."
    )
    for limit in pruned.limits:
        out.print(f"· {limit}", highlight=False, markup=False)


def _show_scored(scored: Scored, found: Trained, limit: int | None) -> None:
    out = _console()
    title = f"{scored.path} on {scored.task}, {scored.split}, {scored.rows:,} rows"
    own = found.recipe is not None and found.recipe.task.name == scored.task
    if not (found.card and found.scores and own and limit is None and scored.split == "validation"):
        out.print(title, highlight=False)
        rows = [(name, f"{value:.2f}" if name != "loss" else f"{value:.4f}") for name, value in scored.scores.items()]
        return out.print(display.two_columns([*rows, ("precision", scored.precision)]))
    card = found.card
    digits = {name: 4 if name == "loss" else 2 for name in scored.scores}
    table = [
        (name, f"{found.scores[name]:.{digits[name]}f}", f"{value:.{digits[name]}f}")
        for name, value in scored.scores.items()
        if name in found.scores
    ]
    kept, of = sum(card["ranks"].values()), sum(card["start"].values())
    table.append(("ranks", str(of), f"{kept} ({kept / of:.0%})"))
    table.append(("adapter size", *(display.size(n) for n in card["bytes"])))  # type: ignore[arg-type]
    table.append(("scored in", f"{found.precision}, by the run", f"{scored.precision}, reloaded"))
    return out.print(display.before_after(table, title))


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "not evaluated"


def _one_of(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise LorakitError(
            f"{option}: {given!r}: expected {' or '.join(known)}.{nearest(given, known)}"
        )


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _console() -> Console:
    return Console()


def _error_console() -> Console:
    return Console(stderr=True)

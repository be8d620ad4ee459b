"""What `lorakit eval` and `predict` do."""

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console, Group, RenderableType

from lorakit import display, harness, progress, sheets, submission, tasks
from lorakit.commands.opening import Source, opened
from lorakit.disk import refuse_locked, write_text
from lorakit.display import print_json, size
from lorakit.errors import FolderError, LorakitError, one_of
from lorakit.evaluate import Scored, Wanted, each, names_in, outputs, score, task_name
from lorakit.harness import Measured
from lorakit.inputs import Given
from lorakit.models import Precision
from lorakit.predict import FORMATS, Counts, Settings, answers, reading, row
from lorakit.submission import Submitted
from lorakit.tasks import glue
from lorakit.trained import Card, Trained


def evaluate(
    source: Source,
    wanted: Wanted,
    precision: str,
    output_path: Path | None,
    predictions: Path | None,
    as_json: bool,
) -> None:
    """`lorakit eval`."""
    one_of("--precision", precision, get_args(Precision))
    if output_path is not None:
        _refuse_no_file(output_path)
    watch = progress.Watch(Console(stderr=True), quiet=as_json)
    asked = _asked(wanted, predictions)
    found = opened(source, watch, cast(Precision, precision))
    with watch:
        answered, shown = _answered(found, wanted, precision, predictions, asked)
    for note in dict.fromkeys(note for one in answered for note in one.notes):
        watch.note(note)
    results = [{**asdict(one), "step": found.step} for one in answered]
    result = results[0] if len(results) == 1 else {"results": results}
    if output_path is not None:
        write_text(output_path, json.dumps(result, indent=2, default=str) + "\n")
    if as_json:
        print_json(result)
    else:
        Console(highlight=False, markup=False).print(shown)


def _refuse_no_file(path: Path) -> None:
    """Raises FolderError, before anything is scored, where the result could not be written."""
    if path.is_dir() or not path.parent.is_dir():
        raise FolderError(f"--output-path: {path}: expected a file in a folder that exists.")
    refuse_locked(path)


def _asked(wanted: Wanted, predictions: Path | None) -> harness.Asked | None:
    """The harness's tasks, found; null where lorakit's own are wanted.

    Raises:
        LorakitError: a task is not known, or both kinds are wanted; or an option says nothing of
            the kind that is.

    """
    names = [] if wanted.task is None else names_in(wanted.task)
    elsewhere = [name for name in names if name not in tasks.names() and not _is_glue(name)]
    if own := [name for name in names if name not in elsewhere]:
        if elsewhere:
            raise LorakitError(
                f"--task: {', '.join(own)} of lorakit's own tasks and {', '.join(elsewhere)} of "
                "lm-evaluation-harness's are scored in different ways; ask for one kind at a time."
            )
        for name in own:
            one_of("--task", name, tasks.names())
    _refuse_unheard(wanted, predictions, bool(elsewhere))
    return harness.find(str(wanted.task), wanted.include) if elsewhere else None


def _is_glue(name: str) -> bool:
    """Whether it is a task of GLUE's, or meant to be."""
    return name.startswith(glue.PREFIX)


def _answered(
    found: Trained,
    wanted: Wanted,
    precision: str,
    predictions: Path | None,
    asked: harness.Asked | None,
) -> tuple[Sequence[Scored | Submitted | Measured], RenderableType]:
    """The results, and what a person sees of them."""
    if asked is not None:
        measured = harness.measure(found, asked, wanted, precision)
        title = f"{measured.path}, asked by lm-evaluation-harness {measured.harness}"
        table = display.measured_table(measured.rows, measured.scores, measured.errors)
        return [measured], Group(title, table)
    if predictions is not None:
        written = _submitted(found, each(wanted), predictions)
        return written, "\n".join(f"written: {one.file}, {one.rows:,} rows" for one in written)
    scored = score(found, each(wanted), precision)
    if len(scored) == 1:
        return scored, _shown(scored[0], found, whole=wanted.limit is None)
    title = f"{found.path} in {precision}"
    rows = [(one.task, one.split, one.rows, one.scores) for one in scored]
    return scored, Group(title, display.scored_table(rows))


def _refuse_unheard(wanted: Wanted, predictions: Path | None, elsewhere: bool) -> None:
    """Raises LorakitError for options that say nothing of the tasks that are asked for."""
    theirs = {"num-fewshot": wanted.few_shot, "include-path": wanted.include}
    split = None if wanted.split == Wanted.split else wanted.split
    ours = {"data-dir": wanted.data_dir, "predictions": predictions, "split": split}
    unheard, whose = (ours, "GLUE") if elsewhere else (theirs, "the harness")
    if given := [f"--{name}" for name, value in unheard.items() if value is not None]:
        raise LorakitError(f"{', '.join(given)}: goes with tasks of {whose}, by --task.")


def _submitted(found: Trained, wanted: Sequence[Wanted], folder: Path) -> list[Submitted]:
    """Writes GLUE's files of what is predicted of each row."""
    names = [task_name(found, one) for one in wanted]
    for name in names:
        submission.check(name, folder)
    written = []
    for name, one, (rows, notes) in zip(names, wanted, outputs(found, wanted), strict=True):
        file = submission.write(folder, name, one.split, rows)
        written.append(Submitted(found.path, name, one.split, len(rows), file, notes))
    return written


def predict(
    source: Source,
    given: Given,
    out: Path | None,
    settings: Settings,
    precision: str,
    as_json: bool,
) -> None:
    """`lorakit predict`."""
    one_of("--precision", precision, get_args(Precision))
    if settings.format is not None:
        one_of("--format", settings.format, FORMATS)
    if out is not None:
        sheets.check(out)
    console = Console(stderr=True)
    watch = progress.Watch(console, quiet=as_json)
    found = opened(source, watch, cast(Precision, precision))
    how, counts = reading(found, given.columns), Counts()
    texts = answers(found, given.inputs(how), settings, counts)
    rows: list[Mapping[str, Any]] = []
    with (
        progress.counting(console, "texts", as_json) as tick,
        sheets.opened(out) if out else nullcontext(rows.append) as write,
    ):
        for text, answer in texts:
            write(row(text, answer))
            tick()
    done = counts.read - counts.empty
    for note in counts.notes():
        watch.note(note)
    if as_json:
        told = {"predictions": rows} if out is None else {"out": str(out), "rows": done}
        print_json({**told, "notes": counts.notes()})
    elif out is not None:
        Console().print(display.two_columns([("written", f"{out}, {done:,} rows")]))
    elif rows:
        Console().print(display.answer_table(rows))


def _shown(scored: Scored, found: Trained, whole: bool) -> RenderableType:
    """Scores, beside those before pruning where they are on the same rows."""
    title = f"{scored.path} on {scored.task}, {scored.split}, {scored.rows:,} rows"
    written = {name: display.score(name, value) for name, value in scored.scores.items()}
    own = found.recipe is not None and found.recipe.task.name == scored.task
    if found.card is None or not (own and whole and scored.split == "validation"):
        return Group(
            title, display.two_columns([*written.items(), ("precision", scored.precision)])
        )
    before = {name: display.score(name, value) for name, value in found.scores.items()}
    full, pruned = found.card.bytes
    rows = [
        *((name, before[name], value) for name, value in written.items() if name in before),
        display.ranks(found.card.start, found.card.ranks),
        ("adapter size", size(full), size(pruned)),
        *_other_forms(found.card),
        ("scored in", f"{found.precision}, by the run", f"{scored.precision}, reloaded"),
    ]
    return display.before_after(rows, title)


def _other_forms(card: Card) -> list[tuple[str, str, str]]:
    """The size a folder of codes would have in float32, and the other way round."""
    forms = card.bytes_by_form.items()
    return [(f"size if {form}", "", size(n)) for form, n in forms if form != card.form]

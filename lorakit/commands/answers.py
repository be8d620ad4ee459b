"""What `lorakit eval` and `predict` do."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard, cast, get_args

from rich.console import Console, Group, RenderableType

from lorakit import display, harness, progress, run_folder, sheets, submission, tasks, trained
from lorakit.disk import write_text
from lorakit.display import print_json, size
from lorakit.errors import FolderError, LorakitError, one_of
from lorakit.evaluate import Scored, Wanted, outputs, score, task_name
from lorakit.harness import Measured
from lorakit.inputs import Given
from lorakit.models import Precision
from lorakit.predict import FORMATS, Counts, Settings, answers, reading, row
from lorakit.submission import Submitted
from lorakit.tasks import glue
from lorakit.trained import Card, Trained

RUNS = Path("runs")
"""Where `eval` looks for the newest run."""


def evaluate(
    path: Path | None,
    wanted: Wanted,
    precision: str,
    output_path: Path | None,
    predictions: Path | None,
    which: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """`lorakit eval`."""
    one_of("--precision", precision, get_args(Precision))
    if output_path is not None and (output_path.is_dir() or not output_path.parent.is_dir()):
        raise FolderError(f"--output-path: {output_path}: expected a file in a folder that exists.")
    watch = progress.Watch(Console(stderr=True), quiet=as_json)
    if path is None:
        path = run_folder.newest_run(RUNS)
        watch.note(f"the newest run: {path}")
    _refuse_unheard(wanted, predictions)
    asked = None
    if _is_elsewhere(wanted.task):
        asked = harness.find(wanted.task, wanted.include)
    elif wanted.task is not None:
        one_of("--task", wanted.task, tasks.names())
    found = trained.open_trained(path, which, cast(Precision, precision), base)
    answered, shown = _answered(found, wanted, precision, predictions, asked)
    for note in answered.notes:
        watch.note(note)
    result = {**asdict(answered), "step": found.step}
    if output_path is not None:
        write_text(output_path, json.dumps(result, indent=2, default=str) + "\n")
    if as_json:
        print_json(result)
    else:
        Console(highlight=False, markup=False).print(shown)


def _answered(
    found: Trained,
    wanted: Wanted,
    precision: str,
    predictions: Path | None,
    asked: harness.Asked | None,
) -> tuple[Scored | Submitted | Measured, RenderableType]:
    """The result, and what a person sees of it."""
    if predictions is not None:
        submitted = _submitted(found, wanted, predictions)
        return submitted, f"written: {submitted.file}, {submitted.rows:,} rows"
    if asked is not None:
        measured = harness.measure(found, asked, wanted, precision)
        title = f"{measured.path}, asked by lm-evaluation-harness {measured.harness}"
        table = display.measured_table(measured.rows, measured.scores, measured.errors)
        return measured, Group(title, table)
    scored = score(found, wanted, precision)
    return scored, _shown(scored, found, whole=wanted.limit is None)


def _is_elsewhere(task: str | None) -> TypeGuard[str]:
    """Whether a task is not lorakit's own, nor meant to be."""
    return task not in (None, *tasks.names()) and not str(task).startswith(glue.PREFIX)


def _refuse_unheard(wanted: Wanted, predictions: Path | None) -> None:
    """Raises LorakitError for options that say nothing of the task that is asked for."""
    elsewhere = {"num-fewshot": wanted.few_shot, "include-path": wanted.include}
    here = {"data-dir": wanted.data_dir, "predictions": predictions}
    unheard, whose = (here, "GLUE") if _is_elsewhere(wanted.task) else (elsewhere, "the harness")
    if given := [f"--{name}" for name, value in unheard.items() if value is not None]:
        raise LorakitError(f"{', '.join(given)}: goes with tasks of {whose}; got {wanted.task}.")


def _submitted(found: Trained, wanted: Wanted, folder: Path) -> Submitted:
    """Writes GLUE's file of what is predicted of each row."""
    task = task_name(found, wanted)
    submission.check(task, folder)
    rows, notes = outputs(found, wanted)
    file = submission.write(folder, task, wanted.split, rows)
    return Submitted(found.path, task, wanted.split, len(rows), file, notes)


def predict(
    path: Path,
    given: Given,
    out: Path | None,
    settings: Settings,
    precision: str,
    which: str | None,
    base: str | None,
    as_json: bool,
) -> None:
    """`lorakit predict`."""
    one_of("--precision", precision, get_args(Precision))
    if settings.format is not None:
        one_of("--format", settings.format, FORMATS)
    if out is not None:
        sheets.check(out)
    console = Console(stderr=True)
    found = trained.open_trained(path, which, cast(Precision, precision), base)
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
    watch = progress.Watch(console, quiet=as_json)
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

"""Assembly: from a recipe to a trained run folder."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lorakit import checkpoint, models, optim, variants
from lorakit import recipe as recipes
from lorakit.adapter import Controller
from lorakit.checkpoint import Meta
from lorakit.disk import refuse_existing, whole_folder, write_text
from lorakit.engine import Engine
from lorakit.environment import environment
from lorakit.errors import FolderError, RecipeError, several
from lorakit.prepare import Prepared, prepare
from lorakit.sections import Recipe
from lorakit.timetable import Timetable
from lorakit.train import Progress, Row, Trainee, finished, train


class Screen(Protocol):
    """Where a person watches."""

    def note(self, text: str) -> None:
        """A thing to be said aloud, once."""

    def warn(self, text: str) -> None:
        """A thing not to be missed."""

    def begin(self, done: int, timetable: Timetable, start_ranks: int) -> None:
        """Training starts, `done` steps in; so many ranks there are to learn from."""

    def tick(self, step: int) -> None:
        """A step is over."""

    def log(self, row: Row) -> None:
        """A row of metrics.jsonl."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Path
    step: int
    best_step: int | None
    scores: dict[str, float]
    """Of the checkpoint that `prune` and `eval` would take: the best, else the last."""
    live: int
    start: int
    """Ranks in all: live at the end, and at the start."""
    warnings: tuple[str, ...]
    """What a person must know of how it went."""


def run(recipe: Recipe, resume: bool, screen: Screen) -> Outcome | None:
    """Trains a recipe into its `output_dir`, or goes on where `resume` finds it.

    Of several processes the first writes, speaks and answers; the others return None.

    Raises:
        LorakitError: before anything is written, or, for a non-finite loss, on the way.

    """
    folder = Path(recipe.output_dir)
    if resume:
        check_resumable(recipe, folder)
    else:
        refuse_existing(folder, "Go on with --resume, or choose another name: output_dir=NAME.")
    engine = Engine()
    engine.wait()  # all have looked before one writes
    prepared = prepare(recipe, engine.processes)
    say = screen.note if engine.is_main else _unheard
    for note in prepared.notes:
        say(note)
    last = _last(folder) if resume else None
    if last is not None:
        checkpoint.load_weights(last, prepared.layers, prepared.whole_modules())
    trainee = _trainee(prepared, engine)  # after the weights: they may have been compacted
    if not resume:
        _make(folder, recipe, engine)
    else:
        _go_on(folder, last, trainee, engine)
        say(f"resumed at step {trainee.progress.step:,} of {prepared.timetable.steps:,}")
    timetable, progress = prepared.timetable, trainee.progress
    if not finished(progress, recipe.train, timetable):
        start = sum(planned.rank for planned in prepared.plans.values())
        if engine.is_main:
            screen.begin(progress.step, timetable, start)
        journal = Journal(folder, prepared, screen, engine.is_main)
        train(trainee, prepared.task, recipe.train, timetable, recipe.seed, engine, journal)
    if not engine.is_main:
        return None
    outcome = _outcome(folder, prepared, trainee)
    for warning in outcome.warnings:
        screen.warn(warning)
    return outcome


def check(recipe: Recipe) -> Prepared:
    """All that `run` does before it writes.

    Raises:
        LorakitError: as `run` would.

    """
    refuse_existing(Path(recipe.output_dir), "Choose another name: output_dir=NAME.")
    prepared = prepare(recipe)
    _controller(prepared)  # it may refuse the run's length
    return prepared


class Journal:
    """Writes what the loop tells: metrics.jsonl and checkpoints; and shows it."""

    def __init__(self, folder: Path, prepared: Prepared, screen: Screen, writes: bool) -> None:
        self.folder, self.prepared, self.screen, self.writes = folder, prepared, screen, writes
        self.latest: Row = {}

    def tick(self, step: int) -> None:
        """Passes it on."""
        if self.writes:
            self.screen.tick(step)

    def log(self, row: Row) -> None:
        """Appends a line."""
        if not self.writes:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.screen.log(row)
        self.latest = row

    def save(self, trainee: Trainee) -> None:
        """Writes a checkpoint, with the scores if this step has been evaluated."""
        if not self.writes:
            return
        step, prepared = trainee.progress.step, self.prepared
        head = prepared.task.head()
        names = prepared.task.metric_names()
        scored = self.latest if self.latest.get("step") == step else {}
        meta = Meta(
            step=step,
            progress=asdict(trainee.progress),
            labels=head.labels,
            head=prepared.base.head,
            whole=prepared.whole,
            plans={name: (planned.rank, planned.scale) for name, planned in prepared.plans.items()},
            scores={name: scored[name] for name in names if name in scored},
            precision=_precision(prepared.base),
            kind=head.kind,
            multiple=head.multiple,
        )
        checkpoint.save(self.folder, trainee, prepared.whole_modules(), meta)


def _unheard(text: str) -> None:
    """What a process says that is not the first."""


def check_resumable(recipe: Recipe, folder: Path) -> None:
    """Raises FolderError unless `folder` is a run of this same recipe."""
    if not (folder / "recipe.yaml").is_file():
        raise FolderError(f"--resume: {folder} is no run folder; start without --resume.")
    if changed := recipes.differences(recipes.restore(folder), recipe):
        raise FolderError(several(f"--resume: {folder} was started with another recipe", changed))


def _controller(prepared: Prepared, processes: int = 1) -> Controller[Any, Any]:
    config = prepared.recipe.adapter
    make = variants.get(config.variant).controller
    controller = make(prepared.layers, config, prepared.timetable.steps)
    if controller.compacts() and processes > 1:  # data-parallel training holds on to parameters
        raise RecipeError(
            f"adapter: layers can be compacted in one process only; these are {processes}. Turn "
            "compaction off: dead ranks then stay where they are, and nothing else changes."
        )
    return controller


def _trainee(prepared: Prepared, engine: Engine) -> Trainee:
    model = prepared.base.model.to(engine.device)
    controller = _controller(prepared, engine.processes)  # first: it may set the layers' rates
    optimizer = optim.adamw(model, prepared.layers, prepared.recipe.train)
    return Trainee(model, prepared.layers, controller, optimizer, Progress())


def _make(folder: Path, recipe: Recipe, engine: Engine) -> None:
    """The run folder with what is known before training."""
    if not engine.is_main:
        return
    with whole_folder(folder) as temporary:
        (temporary / "recipe.yaml").write_text(recipes.dump(recipe), encoding="utf-8")
        (temporary / "environment.json").write_text(
            json.dumps(environment(engine), indent=2) + "\n"
        )
        (temporary / "metrics.jsonl").touch()


def _last(run: Path) -> Path | None:
    """The last checkpoint of a run, if it has come to one."""
    return checkpoint.find(run, "last") if (run / "checkpoints" / "last").is_file() else None


def _go_on(folder: Path, last: Path | None, trainee: Trainee, engine: Engine) -> None:
    """Puts back all but the weights, and drops the lines of metrics.jsonl after it."""
    if last is not None:
        checkpoint.load_state(last, trainee)
    if not engine.is_main:
        return
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= trainee.progress.step]
    write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite where a crash cut the line off."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def _outcome(folder: Path, prepared: Prepared, trainee: Trainee) -> Outcome:
    chosen = checkpoint.meta(checkpoint.find(folder))
    live, warnings = sum(layer.rank() for layer in trainee.layers.values()), []
    if not live:
        warnings.append("every rank has died: the adapter does nothing; push less, or train longer")
    return Outcome(
        run=folder,
        step=trainee.progress.step,
        best_step=trainee.progress.best_step,
        scores=chosen.scores,
        live=live,
        start=sum(planned.rank for planned in prepared.plans.values()),
        warnings=(*warnings, *trainee.controller.ended()),
    )


def _precision(base: models.Base) -> str:
    dtypes = {p.dtype for p in base.model.parameters() if not p.requires_grad}
    return "bf16" if torch.bfloat16 in dtypes else "fp32"

"""Assembly: from a recipe to a trained run folder."""

import json
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lorakit import checkpoint, optim, resuming, run_folder, variants
from lorakit import recipe as recipes
from lorakit.adapter import Controller
from lorakit.disk import locked, refuse_existing, whole_folder
from lorakit.engine import Engine
from lorakit.environment import environment
from lorakit.errors import NotFiniteError, RecipeError, Stopped
from lorakit.journal import Journal, Screen
from lorakit.prepare import Prepared, prepare, settled
from lorakit.sections import Recipe
from lorakit.train import finished, train
from lorakit.trainee import Progress, Trainee


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


def run(recipe: Recipe, resume: bool, screen: Screen, force: bool = False) -> Outcome | None:
    """Trains a recipe into its `output_dir`, or goes on where `resume` finds it; with `force` over
    a base model of other weights, too.

    Of several processes the first writes, speaks and answers; the others return None.

    Raises:
        LorakitError: before anything is written, or, for a non-finite loss, on the way.
        Stopped: SIGINT or SIGTERM came; the run has saved where it is.

    """
    folder, engine = Path(recipe.output_dir), Engine()
    if resume:
        resuming.check(settled(recipe)[0], folder)
    else:
        refuse_existing(folder, "Go on with --resume, or choose another name: output_dir=NAME.")
    engine.wait()  # all have looked before one writes
    with ExitStack() as held:
        if resume:
            held.enter_context(_alone(folder, engine))
        prepared = prepare(recipe, engine.processes)
        trainee = _begun(prepared, folder, resume, engine, screen, force)
        if not resume:
            held.enter_context(_alone(folder, engine))
        _finish(prepared, trainee, folder, engine, screen)
    if not engine.is_main:
        return None
    outcome = _outcome(folder, prepared, trainee)
    for warning in outcome.warnings:
        screen.warn(warning)
    return outcome


def _begun(
    prepared: Prepared, folder: Path, resume: bool, engine: Engine, screen: Screen, force: bool
) -> Trainee:
    """What is to be trained, as it starts or as it was left; the folder is made, or put in order.

    Of a resumed run, a checkpoint that was broken since, and what it writes over, is told.
    """
    say = screen.note if engine.is_main else _unheard
    for note in prepared.notes:
        say(note)
    found = resuming.find(folder, prepared, force) if resume else None
    engine.wait()  # all have looked before one puts in order
    if found is not None:
        for warning in found.warnings if engine.is_main else ():
            screen.warn(warning)
        if found.last is not None:
            checkpoint.load_weights(found.last, prepared.layers, prepared.whole_modules())
    trainee = _trainee(prepared, engine)  # after the weights: they may have been compacted
    if found is None:
        _make(folder, prepared, engine)
        return trainee
    resuming.put_back(folder, found.last, trainee, engine)
    say(f"resumed at step {trainee.progress.step:,} of {prepared.timetable.steps:,}")
    for change in resuming.moved(folder, engine):
        say(f"{change}: the last digits of results may differ")
    return trainee


def _finish(
    prepared: Prepared, trainee: Trainee, folder: Path, engine: Engine, screen: Screen
) -> None:
    """Takes the steps that are left, if there are any."""
    section, timetable = prepared.recipe.train, prepared.timetable
    if finished(trainee.progress, section, timetable):  # a kill may have cut the last save short
        Journal(folder, prepared, screen, engine.is_main, ()).save(trainee)
        return
    if engine.is_main:
        start = sum(planned.rank for planned in prepared.plans.values())
        screen.begin(trainee.progress.step, timetable, start)
    with told_to_stop() as signals:
        journal = Journal(folder, prepared, screen, engine.is_main, signals)
        try:
            train(trainee, prepared.task, section, timetable, prepared.recipe.seed, engine, journal)
        except NotFiniteError as error:
            raise NotFiniteError(f"{error}{_way_back(folder)}") from None
    if not finished(trainee.progress, section, timetable):  # the signal may be another process's
        raise Stopped(
            f"stopped at step {trainee.progress.step:,} of {timetable.steps:,}, which is saved; "
            f"go on with: lorakit train {folder} --resume",
            signals[0] if signals else signal.SIGTERM,
        )


def _way_back(folder: Path) -> str:
    """The last good checkpoint, for a message."""
    last = run_folder.last_good(folder)
    return f"\n  The last good checkpoint is {last}." if last else ""


@contextmanager
def told_to_stop() -> Iterator[list[int]]:
    """The numbers of signals that have come, SIGINT (Ctrl-C) and SIGTERM; the next one is deadly.

    Signals reach the main thread alone; in any other nothing is caught.
    """
    caught: list[int] = []

    before: dict[signal.Signals, Any] = {}

    def take(number: int, _: FrameType | None) -> None:
        caught.append(number)
        give_back()

    def give_back() -> None:
        for each, handler in before.items():
            signal.signal(each, handler)

    with suppress(ValueError):  # not the main thread
        for each in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(each) is not signal.SIG_IGN:  # as in a shell's background
                before[each] = signal.signal(each, take)
    try:
        yield caught
    finally:
        give_back()


def _alone(folder: Path, engine: Engine) -> AbstractContextManager[None]:
    """Within it, no other run writes into `folder`."""
    return locked(folder) if engine.is_main else nullcontext()


def check(recipe: Recipe) -> Prepared:
    """All that `run` does before it writes.

    Raises:
        LorakitError: as `run` would.

    """
    refuse_existing(Path(recipe.output_dir), "Choose another name: output_dir=NAME.")
    prepared = prepare(recipe)
    _controller(prepared)  # it may refuse the run's length
    return prepared


def _unheard(text: str) -> None:
    """What a process says that is not the first."""


def _controller(prepared: Prepared, processes: int = 1) -> Controller[Any, Any]:
    config = prepared.recipe.adapter
    make = variants.get(config.variant).controller
    controller = make(prepared.layers, config, prepared.timetable.steps)
    if controller.compacts() and (why := _in_the_way_of_compaction(prepared, processes)):
        raise RecipeError(
            f"adapter: layers can be compacted {why}. Turn compaction off: dead ranks then stay "
            "where they are, and nothing else changes."
        )
    return controller


def _in_the_way_of_compaction(prepared: Prepared, processes: int) -> str | None:
    """What would hold on to parameters as they were, or could not shrink with them."""
    section = prepared.recipe.train
    if processes > 1:
        return f"in one process only; these are {processes}"
    if section.compile:
        return "only where train.compile is off"
    if section.optimizer.endswith("8bit"):
        return f"only with moments in 32 bits; train.optimizer is {section.optimizer}"
    return None


def _trainee(prepared: Prepared, engine: Engine) -> Trainee:
    model = prepared.base.model.to(engine.device)
    controller = _controller(prepared, engine.processes)  # first: it may set the layers' rates
    optimizer = optim.adamw(model, prepared.layers, prepared.recipe.train)
    return Trainee(model, prepared.layers, controller, optimizer, Progress())


def _make(folder: Path, prepared: Prepared, engine: Engine) -> None:
    """The run folder with what is known before training."""
    if not engine.is_main:
        return
    known = environment(engine) | {
        "revisions": {
            "model": prepared.base.fingerprint.commit,
            "data": dict(prepared.task.origins),
        }
    }
    with whole_folder(folder) as temporary:
        (temporary / "recipe.yaml").write_text(recipes.dump(prepared.recipe), encoding="utf-8")
        (temporary / "environment.json").write_text(json.dumps(known, indent=2) + "\n")
        (temporary / "metrics.jsonl").touch()


def _outcome(folder: Path, prepared: Prepared, trainee: Trainee) -> Outcome:
    chosen = checkpoint.meta(run_folder.find(folder))
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

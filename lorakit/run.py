"""Assembly: from a recipe to a trained run folder."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit import checkpoint, models, optim, tasks, variants
from lorakit import recipe as recipes
from lorakit.adapter import Plan
from lorakit.checkpoint import Meta
from lorakit.data.batching import steps_in_epoch
from lorakit.disk import refuse_existing, whole_folder, write_text
from lorakit.engine import Engine
from lorakit.errors import FolderError, RecipeError, nearest, several
from lorakit.inject import Layers, inject, plan, sites, trained_whole
from lorakit.memory import Estimate, estimate
from lorakit.recipe import Recipe
from lorakit.train import Progress, Row, Timetable, Trainee, finished, train
from lorakit.trained import pairs_at

PACKAGES = (
    "lorakit",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "tokenizers",
)


class Screen(Protocol):
    """Where a person watches."""

    def note(self, text: str) -> None:
        """A thing to be said aloud, once."""

    def begin(self, done: int, timetable: Timetable, start_ranks: int) -> None:
        """Training starts, `done` steps in; so many ranks there are to learn from."""

    def tick(self, step: int) -> None:
        """A step is over."""

    def log(self, row: Row) -> None:
        """A row of metrics.jsonl."""


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything loaded, before the first step."""

    recipe: Recipe
    task: tasks.Task
    base: models.Base
    layers: Layers
    plans: Mapping[str, Plan]
    whole: tuple[str, ...]
    timetable: Timetable
    notes: tuple[str, ...]

    def memory(self) -> Estimate:
        """What training will take."""
        rows, tokens = self.recipe.train.batch_size, self.recipe.task.max_length
        return estimate(self.base.model, rows, tokens)

    def trainable(self) -> int:
        """Numbers that training moves."""
        return sum(p.numel() for p in self.base.model.parameters() if p.requires_grad)


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


def prepare(recipe: Recipe, processes: int = 1) -> Prepared:
    """Reads the rows, loads the model, puts adapters in.

    Raises:
        LorakitError: something the recipe names is not there or does not fit.

    """
    task = tasks.build(recipe.task, recipe.data)
    base = models.load(recipe.model, task.head(), recipe.seed)
    _check_fit(recipe, task, base)
    config, notes = recipe.adapter, list(task.notes)
    whole = trained_whole(base.model, base.head, config.also_train)
    found = sites(base.model, config, whole)
    ranks, starts = None, None
    heads: dict[str, dict[str, Tensor]] = {}
    if config.init_from is not None:
        starts, heads = pairs_at(_existing(config.init_from, "adapter.init_from"))
    if config.ranks_from is not None:
        pairs, _ = pairs_at(_existing(config.ranks_from, "adapter.ranks_from"))
        ranks = {name: pair.rank for name, pair in pairs.items()}
    plans = plan(config, found, ranks, starts)
    layers = inject(base.model, plans, variants.get(config.variant).layer, config, whole, base.head)
    notes += _take_over(heads, base, whole)
    size = recipe.train.batch_size * recipe.train.accumulate * processes
    timetable = recipe.train.timetable(steps_in_epoch(task.rows("train"), size))
    ready = task.ready(base.tokenizer)
    return Prepared(recipe, ready, base, layers, plans, whole, timetable, tuple(notes))


def run(recipe: Recipe, resume: bool, screen: Screen) -> Outcome:
    """Trains a recipe into its `output_dir`, or goes on where `resume` finds it.

    Raises:
        LorakitError: before anything is written, or, for a non-finite loss, on the way.

    """
    folder = Path(recipe.output_dir)
    if resume:
        check_resumable(recipe, folder)
    else:
        refuse_existing(folder, "Go on with --resume, or choose another name: output_dir=NAME.")
    engine = Engine()
    prepared = prepare(recipe, engine.processes)
    for note in prepared.notes:
        screen.note(note)
    trainee = _trainee(prepared, engine)
    if not resume:
        _make(folder, recipe, engine)
    else:
        _go_on(folder, trainee, prepared)
        screen.note(f"resumed at step {trainee.progress.step:,} of {prepared.timetable.steps:,}")
    timetable, progress = prepared.timetable, trainee.progress
    if not finished(progress, recipe.train, timetable):
        start = sum(planned.rank for planned in prepared.plans.values())
        screen.begin(progress.step, timetable, start)
        journal = Journal(folder, prepared, screen, engine.is_main)
        train(trainee, prepared.task, recipe.train, timetable, recipe.seed, engine, journal)
    return _outcome(folder, prepared, progress)


def check(recipe: Recipe) -> Prepared:
    """All that `run` does before it writes.

    Raises:
        LorakitError: as `run` would.

    """
    refuse_existing(Path(recipe.output_dir), "Choose another name: output_dir=NAME.")
    return prepare(recipe)


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
        names = prepared.task.metric_names()
        scored = self.latest if self.latest.get("step") == step else {}
        meta = Meta(
            step=step,
            progress=asdict(trainee.progress),
            labels=prepared.task.head().labels,
            head=prepared.base.head,
            whole=prepared.whole,
            plans={name: (planned.rank, planned.scale) for name, planned in prepared.plans.items()},
            scores={name: scored[name] for name in names if name in scored},
            precision=_precision(prepared.base),
        )
        whole = {name: trainee.model.get_submodule(name) for name in prepared.whole}
        checkpoint.save(self.folder, trainee, whole, meta)


def check_resumable(recipe: Recipe, folder: Path) -> None:
    """Raises FolderError unless `folder` is a run of this same recipe."""
    if not (folder / "recipe.yaml").is_file():
        raise FolderError(f"--resume: {folder} is no run folder; start without --resume.")
    if changed := recipes.differences(recipes.restore(folder), recipe):
        raise FolderError(several(f"--resume: {folder} was started with another recipe", changed))


def environment(engine: Engine) -> dict[str, Any]:
    """Versions and hardware: what a reader of results needs to know. No paths, no variables."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": str(engine.device),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": engine.processes,
    }


def _check_fit(recipe: Recipe, task: tasks.Task, base: models.Base) -> None:
    faults = []
    if recipe.task.max_length > base.max_tokens:
        faults.append(
            f"task.max_length: {recipe.task.max_length}: "
            f"{recipe.model.name} takes at most {base.max_tokens} tokens."
        )
    best, known = recipe.train.best, task.metric_names()
    if best is not None and best not in known:
        faults.append(
            f"train.best: no metric {best!r}.{nearest(best, known)} Here: {', '.join(known)}."
        )
    if recipe.adapter.init_from and recipe.adapter.ranks_from:
        faults.append("adapter.init_from brings its ranks; ranks_from would be ignored.")
    if faults:
        raise RecipeError(several("the recipe does not fit its task and model", faults))


def _existing(name: str, where: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        raise RecipeError(f"{where}: {name!r}: there is nothing of that name.")
    return path


def _take_over(
    heads: Mapping[str, Mapping[str, Tensor]], base: models.Base, whole: tuple[str, ...]
) -> list[str]:
    """Copies the modules that came with `init_from`, where they fit; says where they don't."""
    notes = []
    for name, state in heads.items():
        own = base.model.get_submodule(name).state_dict() if name in whole else {}
        if {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in state.items()}:
            checkpoint.copy_into(own, state, Path(name))
        else:
            notes.append(f"{name} of adapter.init_from does not fit this task; it starts anew")
    return notes


def _trainee(prepared: Prepared, engine: Engine) -> Trainee:
    model = prepared.base.model.to(engine.device)
    config = prepared.recipe.adapter
    controller = variants.get(config.variant).controller(
        prepared.layers, config, prepared.timetable.steps
    )
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


def _go_on(folder: Path, trainee: Trainee, prepared: Prepared) -> None:
    """Loads the last checkpoint, if there is one, and drops the lines of metrics.jsonl behind it."""
    if (folder / "checkpoints" / "last").is_file():
        last = checkpoint.find(folder, "last")
        whole = {name: trainee.model.get_submodule(name) for name in prepared.whole}
        checkpoint.load_weights(last, trainee.layers, whole)
        checkpoint.load_state(last, trainee)
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


def _outcome(folder: Path, prepared: Prepared, progress: Progress) -> Outcome:
    chosen = checkpoint.meta(checkpoint.find(folder))
    return Outcome(
        run=folder,
        step=progress.step,
        best_step=progress.best_step,
        scores=chosen.scores,
        live=sum(layer.rank() for layer in prepared.layers.values()),
        start=sum(planned.rank for planned in prepared.plans.values()),
    )


def _precision(base: models.Base) -> str:
    dtypes = {p.dtype for p in base.model.parameters() if not p.requires_grad}
    return "bf16" if torch.bfloat16 in dtypes else "fp32"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the project that the run was started in, `-dirty` with changes on top."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()

"""Whether this machine can do what a recipe asks, looked at before anything is trained."""

import shutil
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from lorakit import base, models, run, tasks
from lorakit import recipe as recipes
from lorakit.disk import own_folder, refuse_existing, write_text
from lorakit.display import size
from lorakit.engine import Engine
from lorakit.environment import PACKAGES, environment
from lorakit.errors import FolderError, LorakitError, RecipeError
from lorakit.models.heads import Head
from lorakit.prepare import Prepared, prepare
from lorakit.sections import Recipe

State = Literal["ok", "note", "fail"]

BESIDES = 600 * 2**20
"""Bytes that torch and transformers take themselves."""
NARROW = 0.8
"""Of memory or disk: above this share a run is likely to meet others."""
WAIT = 5.0
"""Seconds for the hub to answer."""


class Check(NamedTuple):
    """What was looked at, and what was found."""

    name: str
    state: State
    text: str
    """Facts; a sentence where something is missing."""


def machine() -> list[Check]:
    """What holds for every recipe."""
    found = environment(Engine())
    packages = ", ".join(f"{name} {found['packages'][name]}" for name in PACKAGES)
    return [
        Check("versions", "ok", f"python {found['python']}, {packages}"),
        Check("device", "ok", f"{found['device']}, {found['cores']} cores, {_instructions()}"),
        _precision(),
        quantization(),
        hub(),
        Check("memory", "ok", f"{size(free_memory())} free"),
        Check("disk", "ok", f"{size(shutil.disk_usage(Path.cwd()).free)} free here"),
    ]


def of_recipe(path: Path, overrides: list[str]) -> list[Check]:
    """What a recipe needs: its files, its model, room in memory and on disk, a place to write."""
    try:
        recipe = recipes.load(path, overrides)
    except RecipeError as error:
        return [Check("recipe", "fail", str(error))]
    checks = [Check("recipe", "ok", f"{recipe.adapter.variant} on {recipe.task.name}")]
    checks.append(_output(Path(recipe.output_dir)))
    try:
        prepared = (run.check if checks[-1].state == "ok" else prepare)(recipe)
    except LorakitError as error:
        return [*checks, *_causes(recipe, error)]
    linears, ranks = len(prepared.plans), sum(plan.rank for plan in prepared.plans.values())
    rows = f"{prepared.task.rows('train'):,} for training"
    return [
        *checks,
        Check("rows", "ok", rows),
        Check("model", "ok", f"{recipe.model.name}: {linears} linears, {ranks:,} ranks"),
        *([quantization(needed=True)] if _in_codes(recipe) else []),
        memory(prepared.memory().total + BESIDES, free_memory()),
        disk(checkpoint_bytes(prepared) * checkpoints(prepared), Path(recipe.output_dir)),
    ]


def quantization(needed: bool = False, make: Callable[[], nn.Module] | None = None) -> Check:
    """Whether a linear in 4 bits, as lorakit makes it, has the same gradient before and after an
    evaluation. On some CPUs bitsandbytes' own has none after it, and what is below stops learning.
    """
    bad: State = "fail" if needed else "note"
    try:
        linear = (make or _four_bit)()
        before = _input_gradient(linear)
        with torch.no_grad():
            linear.eval()(torch.ones(2, 64))
        same = torch.equal(before, _input_gradient(linear))
    except Exception as error:  # of a library for another machine, whatever it may raise
        return Check("4 bits", bad, f"bitsandbytes does not work here: {error!r}.")
    if not same:
        return Check("4 bits", bad, "bitsandbytes computes other gradients after an evaluation.")
    return Check("4 bits", "ok", "bitsandbytes trains, evaluates and trains on")


def hub() -> Check:
    """Whether models and data can be fetched; folders and what is cached serve without it."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return Check("hub", "note", "offline by HF_HUB_OFFLINE: what is cached can be used")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=WAIT):
            return Check("hub", "ok", "reached")
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        return Check("hub", "note", f"not reached ({why}): what is cached can be used")


def memory(needed: int, free: int) -> Check:
    """Whether a run fits, by the estimate of `--dry-run`."""
    told = f"about {size(needed)} needed, {size(free)} free"
    if needed > free:
        return Check(
            "memory",
            "fail",
            f"{told}. Take a smaller train.batch_size with train.accumulate, a smaller "
            "task.max_length, or model.precision=bf16.",
        )
    return Check("memory", "note" if needed > NARROW * free else "ok", told)


def disk(needed: int, folder: Path) -> Check:
    """Whether the checkpoints of a run fit."""
    free = shutil.disk_usage(_above(folder)).free
    told = f"up to {size(needed)} of checkpoints, {size(free)} free"
    if needed > free:
        return Check("disk", "fail", f"{told}. Take train.keep_last, or a larger train.save_every.")
    return Check("disk", "note" if needed > NARROW * free else "ok", told)


def checkpoint_bytes(prepared: Prepared) -> int:
    """Of one checkpoint: what is trained in float32, and two moments of it."""
    return 3 * 4 * prepared.trainable()


def checkpoints(prepared: Prepared) -> int:
    """How many a run leaves at most; each evaluation may bring one that is the best so far."""
    table, section = prepared.timetable, prepared.recipe.train
    if section.keep_last is not None:
        best = section.keep_best or 1
        return section.keep_last + best + 1  # one that is being written
    every = [n for n in (table.save_every, table.eval_every) if n is not None]
    return 1 + sum(table.steps // n for n in every)


def free_memory() -> int:
    """Bytes: of the device, or of this machine or the container that it is."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, limit - used)


def _causes(recipe: Recipe, error: LorakitError) -> list[Check]:
    """Rows and model each alone, so that one fault does not hide the other; else `error`."""
    causes: tuple[tuple[str, Callable[[], object]], ...] = (
        ("rows", lambda: tasks.build(recipe.task, recipe.data)),
        ("model", lambda: models.load(recipe.model, Head(), recipe.seed)),
    )
    found = []
    for name, look in causes:
        try:
            look()
        except LorakitError as fault:
            found.append(Check(name, "fail", str(fault)))
    return found or [Check("recipe", "fail", str(error))]


def _output(folder: Path) -> Check:
    """Whether the run folder can be made: something is written where it will stand."""
    try:
        refuse_existing(folder, "Go on with --resume, or choose another name: output_dir=NAME.")
        with own_folder(_above(folder)) as trial:
            write_text(trial / "trial", "written\n")
    except FolderError as error:
        return Check("output", "fail", str(error))
    except OSError as error:
        return Check("output", "fail", f"{folder} cannot be made: {error.strerror}.")
    return Check("output", "ok", f"{folder} can be made")


def _above(folder: Path) -> Path:
    """The nearest folder that exists."""
    return next(path for path in folder.absolute().parents if path.is_dir())


def _in_codes(recipe: Recipe) -> bool:
    return recipe.model.quantize is not None or "8bit" in recipe.train.optimizer


def _four_bit() -> nn.Module:
    return base.quantized(nn.Linear(64, 64), "nf4", nested=False)


def _input_gradient(linear: nn.Module) -> Tensor:
    x = torch.ones(2, 64, requires_grad=True)
    linear.train()(x).sum().backward()
    return torch.zeros_like(x) if x.grad is None else x.grad


def _precision() -> Check:
    name = "bf16" if models.dtype("auto") is torch.bfloat16 else "fp32"
    why = "computed" if name == "bf16" else "not computed"
    return Check("precision", "ok", f"auto is {name}: bf16 is {why} natively here")


def _instructions() -> str:
    return torch.backends.cpu.get_cpu_capability()

"""A recipe with everything loaded: rows read, model in memory, adapters in place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from lorakit import checkpoint, models, optim, tasks, variants
from lorakit.adapter import Plan
from lorakit.base import dense_weight, is_linear, is_quantized, widths
from lorakit.data.batching import steps_in_epoch
from lorakit.errors import FolderError, ModelError, NotLowRankError, RecipeError, nearest, several
from lorakit.inject import Layers, inject, plan, sites, trained_whole
from lorakit.memory import Estimate, estimate
from lorakit.models.heads import Head
from lorakit.sections import Recipe
from lorakit.timetable import Timetable
from lorakit.trained import pairs_at, ranks_at

T = TypeVar("T")


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

    def whole_modules(self) -> dict[str, nn.Module]:
        """The modules trained whole."""
        return {name: self.base.model.get_submodule(name) for name in self.whole}

    def memory(self) -> Estimate:
        """What training will take."""
        train, tokens = self.recipe.train, self.recipe.task.max_length
        return estimate(self.base.model, train.batch_size, tokens, train.activation_checkpointing)

    def trainable(self) -> int:
        """Numbers that training moves."""
        return sum(p.numel() for p in self.base.model.parameters() if p.requires_grad)


def prepare(recipe: Recipe, processes: int = 1) -> Prepared:
    """Reads the rows, loads the model, puts adapters in.

    Raises:
        LorakitError: something the recipe names is not there or does not fit.

    """
    recipe, found_in_rows = settled(recipe)
    task = tasks.build(recipe.task, recipe.data)
    base = models.load(recipe.model, task.head(), recipe.seed)
    _check_fit(recipe, task, base)
    task.check(base.model)
    task = task.ready(base.tokenizer)
    config, notes = recipe.adapter, [*base.notes, *found_in_rows, *_of_rows(task)]
    whole = trained_whole(base.model, base.head, config.also_train)
    found = sites(base.model, config, whole)
    ranks, starts = None, None
    heads: dict[str, dict[str, Tensor]] = {}
    if config.init_from is not None:
        starts, heads = _learned(pairs_at, config.init_from, "adapter.init_from")
    if config.ranks_from is not None:
        ranks = _learned(ranks_at, config.ranks_from, "adapter.ranks_from")
    plans = _with_weights(plan(config, found, ranks, starts), recipe, task.head(), base)
    layers = inject(base.model, plans, variants.get(config.variant).layer, config, whole, base.head)
    notes += [*_take_over(heads, base, whole), *optim.notes(base.model, recipe.train)]
    if recipe.train.activation_checkpointing:
        _checkpoint(base.model)
    size = recipe.train.batch_size * recipe.train.accumulate * processes
    timetable = recipe.train.timetable(steps_in_epoch(task.rows_per_epoch(), size))
    return Prepared(recipe, task, base, layers, plans, whole, timetable, tuple(notes))


def _with_weights(
    plans: Mapping[str, Plan], recipe: Recipe, head: Head, base: models.Base
) -> dict[str, Plan]:
    """The plans with the weights of `adapter.source` for their start, if there is one."""
    source = recipe.adapter.weights_from
    if source is None:
        return dict(plans)
    own = {name: base.model.get_submodule(name) for name in plans}
    if not any(map(is_quantized, own.values())):
        raise RecipeError(
            "adapter.source: the base is not quantised, so its own weights are what a start is "
            "taken from; leave it out, or set model.quantize."
        )
    try:
        section = models.ModelSection(name=source)
        other = dict(models.load(section, head, recipe.seed, stored=True).model.named_modules())
    except ModelError as error:
        raise RecipeError(f"adapter.source: {error}") from error
    linears = {name for name, module in other.items() if is_linear(module)}
    there = {name: widths(other[name]) if name in linears else None for name in own}
    faults = [
        f"{name}: (in, out) is {widths(linear)} in the base, {there[name] or 'no linear'} there"
        for name, linear in own.items()
        if there[name] != widths(linear)
    ]
    if faults:
        raise RecipeError(several("adapter.source does not fit the base model", faults))
    return {n: p._replace(weight=partial(dense_weight, other[n])) for n, p in plans.items()}


def _checkpoint(model: nn.Module) -> None:
    """Has activations computed again in the backward pass; the model stays as it is otherwise."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            "train.activation_checkpointing: transformers has it not for models of this family."
        )
    model.activation_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def settled(recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with what it leaves to be found from its rows, and what was found, to be said.

    A run's own recipe has it written out.

    Raises:
        DataError: the rows are missing, or none that the task knows.

    """
    task, data, notes = tasks.settled(recipe.task, recipe.data)
    return recipe.model_copy(update={"task": task, "data": data}), notes


def _of_rows(task: tasks.Task) -> list[str]:
    """What was done to the rows; they are encoded for it, so that unfit ones are known by now."""
    for split in ("train", "validation"):
        task.rows(split)
    return list(task.notes)


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


def _learned(read: Callable[[Path], T], name: str, where: str) -> T:
    """What `read` finds at the path of an earlier adapter."""
    path = Path(name).expanduser()
    if not path.exists():
        raise RecipeError(f"{where}: {name!r}: there is nothing of that name.")
    try:
        return read(path)
    except (FolderError, NotLowRankError) as error:
        raise RecipeError(f"{where}: {error}") from error


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

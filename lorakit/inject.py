"""Puts adapters into a model, in place, freezes the rest, and gives the adapters back by name."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter import Adapter, Factors, Plan, VariantConfig
from lorakit.base import is_linear, is_quantized, widths
from lorakit.errors import RecipeError, nearest, several

ALL = "all-linear"
Layers = dict[str, Adapter]


def trained_whole(model: nn.Module, head: Sequence[str], also: Sequence[str]) -> tuple[str, ...]:
    """The head's modules and those that `adapter.also_train` names, by full name.

    Raises:
        RecipeError: a name of `also` fits no module, or one whose weights are stored in codes.

    """
    names = [
        name
        for name, module in model.named_modules()
        if name and next(module.parameters(), None) is not None
    ]
    faults, chosen = [], list(head)
    for given in also:
        found = [name for name in names if _ends(name, given)]
        chosen += found
        faults += [
            f"adapter.also_train: {given!r}: the weights of {name} are stored in codes, which "
            "cannot be trained; leave it out, or model.quantize."
            for name in found
            if any(map(is_quantized, model.get_submodule(name).modules()))
        ]
        if not found:
            ends = {end for name in names for end in (_short(name), name.rpartition(".")[2])}
            near = nearest(given, ends) or f" Modules here: {', '.join(sorted(ends))}."
            faults.append(f"adapter.also_train: no module {given!r}.{near}")
    if faults:
        raise RecipeError(several("the adapter does not fit the model", faults))
    outer = [n for n in chosen if not any(n.startswith(f"{other}.") for other in chosen)]
    return tuple(dict.fromkeys(outer))


def sites(model: nn.Module, config: VariantConfig, whole: Sequence[str]) -> dict[str, nn.Module]:
    """The linears to adapt, by full name, in the model's order; none inside a module of `whole`.

    Raises:
        RecipeError: a target, an exclusion or a block matches nothing; all such are listed, with
            what is there.

    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and not any(name == w or name.startswith(f"{w}.") for w in whole)
    }
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    output = getattr(model, "get_output_embeddings", lambda: None)()  # a language model's
    every = [name for name, linear in linears.items() if linear is not output]
    matched = {t: every if t == ALL else _matching(t, linears) for t in targets}
    excluded = {e: _matching(e, linears) for e in config.exclude}
    blocks = {name: _block(name) for name in linears}
    wanted = None if config.layers is None else _numbers(config.layers)

    faults = [f"adapter.targets: {_none(t, linears)}" for t, found in matched.items() if not found]
    faults += [f"adapter.exclude: {_none(e, linears)}" for e, fits in excluded.items() if not fits]
    if wanted is not None and (beyond := sorted(wanted - set(blocks.values()) - {None})):
        there = sorted(b for b in set(blocks.values()) if b is not None)
        span = f"{there[0]} to {there[-1]}" if there else "none"
        faults.append(f"adapter.layers: no block {_listed(beyond)}; this model has {span}.")
    out = {name for found in excluded.values() for name in found}
    chosen = {
        name: linear
        for name, linear in linears.items()
        if any(name in found for found in matched.values())
        and name not in out
        and (wanted is None or blocks[name] in wanted)
    }
    if not chosen and not faults:
        faults.append("adapter: targets, exclude and layers together leave no linear to adapt.")
    if faults:
        ends = sorted({_short(name) for name in linears})
        faults.append(f"linears here: {', '.join(ends) or 'none'}")
        raise RecipeError("\n".join(["the adapter does not fit the model:", *map(_indent, faults)]))
    return chosen


def plan(
    config: VariantConfig,
    sites: Mapping[str, nn.Module],
    ranks: Mapping[str, int] | None = None,
    starts: Mapping[str, Factors] | None = None,
) -> dict[str, Plan]:
    """What every site starts with: `config.rank`, or what `ranks` or `starts` have learned for it.

    A site that `ranks` or `starts` leaves out gets no adapter. `config.ranks` overrides both.

    Raises:
        RecipeError: a rank is larger than its matrix, a name in `config.ranks` matches nothing, or
            `ranks` or `starts` names a module that is no site.

    """
    learned = {name: pair.rank for name, pair in starts.items()} if starts else ranks
    chosen = {name: config.rank if learned is None else learned.get(name, 0) for name in sites}
    strangers = sorted(set(learned or ()) - set(sites))
    faults = [f"{name}: adapted there, not among this recipe's targets" for name in strangers]
    for given, rank in config.ranks.items():
        found = _matching(given, sites)
        chosen |= dict.fromkeys(found, rank)
        if not found:
            faults.append(f"adapter.ranks: {_none(given, sites)}")
    faults += [
        f"adapter.ranks: {name}: {chosen[name]}, but the adapter of init_from has {pair.rank} there"
        for name, pair in (starts or {}).items()
        if chosen.get(name) and chosen[name] != pair.rank
    ]
    faults += _too_large(chosen, sites)
    if not any(chosen.values()) and not faults:
        faults.append("every rank is 0")
    if faults:
        raise RecipeError(several("adapter.rank, adapter.ranks: they do not fit the model", faults))
    return {
        name: Plan(rank, config.scale, starts.get(name) if starts else None)
        for name, rank in chosen.items()
        if rank
    }


def _too_large(ranks: Mapping[str, int], sites: Mapping[str, nn.Module]) -> list[str]:
    """A line for each kind of matrix that is smaller than its rank."""
    kinds: dict[tuple[str, int, int, int], list[str]] = {}
    for name, rank in ranks.items():
        n, m = widths(sites[name])
        if rank > min(n, m):
            kinds.setdefault((_short(name), rank, m, n), []).append(name)
    return [
        f"{names[0] if len(names) == 1 else f'{kind} in {len(names)} blocks'}: "
        f"rank {rank} is larger than its matrix, {m} x {n}"
        for (kind, rank, m, n), names in kinds.items()
    ]


def inject(
    model: nn.Module,
    plans: Mapping[str, Plan],
    layer: Callable[[nn.Module, Any, Plan], Adapter],
    config: VariantConfig,
    whole: Sequence[str] = (),
    head: Sequence[str] = (),
) -> Layers:
    """Freezes `model`, wraps the planned linears, and frees the modules of `whole` in float32.

    What a module of `whole` gives is cast back to the base's precision, unless it is of the `head`.
    """
    model.requires_grad_(False)
    for name in whole:
        _free(model.get_submodule(name), back=name not in head)
    layers: Layers = {}
    for name, planned in plans.items():
        parent, _, child = name.rpartition(".")
        layers[name] = layer(model.get_submodule(name), config, planned)
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def _free(module: nn.Module, back: bool) -> None:
    """Makes `module` trainable in float32 within a model of another precision."""
    before = next(module.parameters()).dtype
    module.float().requires_grad_(True)
    if before == torch.float32:
        return
    module.register_forward_pre_hook(lambda _, inputs: tuple(map(_float, inputs)))
    if back:
        module.register_forward_hook(lambda _, inputs, output: output.to(before))


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _matching(given: str, names: Iterable[str]) -> list[str]:
    """The names that end in `given`, or match it as a regular expression whole."""
    try:
        pattern = re.compile(given)
    except re.error:
        return [name for name in names if _ends(name, given)]
    return [name for name in names if _ends(name, given) or pattern.fullmatch(name)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _block(name: str) -> int | None:
    """The block a module stands in: the first number in its dotted name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _numbers(text: str) -> set[int]:
    """`0-3,5` -> {0, 1, 2, 3, 5}."""
    spans = [span.partition("-") for span in text.split(",")]
    return {i for low, _, high in spans for i in range(int(low), int(high or low) + 1)}


def _short(name: str) -> str:
    """A module's name after its block's number."""
    return re.sub(r"^.*\.\d+\.", "", name)


def _none(given: str, names: Iterable[str]) -> str:
    try:
        re.compile(given)
    except re.error as error:
        return f"no linear is named {given!r}, nor is it a regular expression: {error}."
    ends = {part for name in names for part in (_short(name), name.rpartition(".")[2])}
    return f"no linear is named {given!r}.{nearest(given, ends)}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _indent(line: str) -> str:
    return f"  {line}"

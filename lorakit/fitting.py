"""Finished pairs, or codes, and trained modules put into a base model fresh from disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorakit import checkpoint, models
from lorakit.adapter import Adapter, Plan, VariantConfig
from lorakit.base import is_linear, widths
from lorakit.errors import FolderError, several
from lorakit.finished import PackedLinear, PlainLinear
from lorakit.inject import Layers, inject
from lorakit.packed import PackedAdapter
from lorakit.prune import Pairs


def with_pairs(
    base: models.Base, pairs: Pairs, whole: Mapping[str, Mapping[str, Tensor]], origin: Path
) -> Layers:
    """Puts plain pairs and whole modules into a fresh base model, in place.

    Raises:
        FolderError: a name or a shape is not the base model's; all such are listed.

    """
    shapes = {name: (len(pair.B), pair.A.shape[1]) for name, pair in pairs.items()}
    _refuse_misfits(base, shapes, whole, origin)
    plans = {name: Plan(pair.rank, 1.0, pair) for name, pair in pairs.items() if pair.rank}
    return _injected(base, plans, PlainLinear, whole, origin)


def with_codes(base: models.Base, adapter: PackedAdapter, origin: Path) -> Layers:
    """Puts coded pairs and whole modules into a fresh base model, in place.

    Raises:
        FolderError: a name or a shape is not the base model's; all such are listed.

    """
    pairs = adapter.pairs
    shapes = {name: (len(pair.B.codes), pair.A.codes.shape[1]) for name, pair in pairs.items()}
    _refuse_misfits(base, shapes, adapter.whole, origin)
    plans = {name: Plan(adapter.start[name], pair.scale) for name, pair in pairs.items()}
    by_linear = {base.model.get_submodule(name): pair for name, pair in pairs.items()}

    def layer(linear: nn.Module, config: VariantConfig, plan: Plan) -> Adapter:
        return PackedLinear(linear, config, plan, by_linear[linear])

    return _injected(base, plans, layer, adapter.whole, origin)


def _refuse_misfits(
    base: models.Base,
    shapes: Mapping[str, tuple[int, int]],
    whole: Mapping[str, Mapping[str, Tensor]],
    origin: Path,
) -> None:
    """Raises FolderError with each name and shape (m, n) that is not the base model's."""
    modules = dict(base.model.named_modules())
    faults = [
        f"{name}: no such module in the base" for name in (*shapes, *whole) if name not in modules
    ]
    for name in [name for name in shapes if name in modules]:
        if not is_linear(modules[name]):
            faults.append(f"{name}: no linear in the base")
        elif (found := widths(modules[name])[::-1]) != (given := shapes[name]):
            faults.append(
                f"{name}: the pair is {given[0]} x {given[1]}, the base {found[0]} x {found[1]}"
            )
    for name in [name for name in whole if name in modules]:
        faults += [
            f"{name}.{fault}"
            for fault in checkpoint.resized(whole[name], modules[name].state_dict())
        ]
    if faults:
        raise FolderError(several(f"{origin} does not fit the base model", faults))


def _injected(
    base: models.Base,
    plans: Mapping[str, Plan],
    layer: Callable[[nn.Module, Any, Plan], Adapter],
    whole: Mapping[str, Mapping[str, Tensor]],
    origin: Path,
) -> Layers:
    for name, state in whole.items():
        own = base.model.get_submodule(name).state_dict()
        named = {f"{name}.{key}": value for key, value in state.items()}
        checkpoint.copy_into({f"{name}.{key}": p for key, p in own.items()}, named, origin)
    config = VariantConfig(variant="plain")
    return inject(base.model, plans, layer, config, tuple(whole), tuple(whole))

"""The optimizer, its parameter groups and the learning-rate schedule."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from math import cos, pi
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lorakit.adapter import Adapter, Shrunk
from lorakit.base import bitsandbytes
from lorakit.errors import RecipeError, several
from lorakit.schema import Section


class OptimSection(Section):
    """AdamW and its learning rate over the run."""

    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit", "paged_adamw32bit"] = "adamw"
    """AdamW by torch; or by bitsandbytes, with moments in 8 bits (those of tensors of 4,096 numbers
    or more), or in memory that a GPU moves to the host's when it runs short (`paged_`; on a CPU the
    same as without)."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; biases, norms and gates have none."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up: to 0 just behind the last step, or not at all."""
    warmup: float = Field(0.06, ge=0.0, lt=1.0)
    """Share of the steps in which the rate rises from 0 to its peak."""


_BITSANDBYTES = {
    "adamw8bit": "AdamW8bit",
    "paged_adamw8bit": "PagedAdamW8bit",
    "paged_adamw32bit": "PagedAdamW32bit",
}
_SMALL = 4096
"""Tensors of fewer numbers keep their moments in 32 bits (bitsandbytes' own `min_8bit_size`)."""


def adamw(model: nn.Module, layers: Mapping[str, Adapter], section: OptimSection) -> Optimizer:
    """AdamW over all that is trainable in `model`; a layer's `optim()` overrides single parameters.

    Parameters of equal settings share a group, which keeps its peak rate under `peak`. Torch's is
    fused: one kernel for all parameters of a group.
    """
    special = {
        id(getattr(layer, name)): settings
        for layer in layers.values()
        for name, settings in layer.optim().items()
    }
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for p in model.parameters():
        if p.requires_grad:
            own = special.get(id(p), {})
            peak = own.get("lr", section.lr) * own.get("lr_scale", 1.0)
            decay = own.get("weight_decay", section.weight_decay if p.ndim > 1 else 0.0)
            group = {"params": [], "lr": peak, "peak": peak, "weight_decay": decay}
            groups.setdefault((peak, decay), group)["params"].append(p)
    if section.optimizer in _BITSANDBYTES:
        return _of_bitsandbytes(section.optimizer, list(groups.values()))
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in model.parameters())
    return AdamW(list(groups.values()), fused=fused)


def _of_bitsandbytes(name: str, groups: list[dict[str, Any]]) -> Optimizer:
    """Where there is nothing to page, the same optimizer without."""
    kind = _BITSANDBYTES[name]
    if not torch.cuda.is_available():
        kind = kind.removeprefix("Paged")
    made: Optimizer = getattr(bitsandbytes().optim, kind)(groups)
    return made


def notes(model: nn.Module, section: OptimSection) -> tuple[str, ...]:
    """Where the optimizer of that name is not what its name says."""
    said = []
    trained = [p for p in model.parameters() if p.requires_grad]
    if section.optimizer.endswith("8bit"):
        sizes = [p.numel() for p in trained]
        large = sum(size for size in sizes if size >= _SMALL)
        said.append(
            f"{section.optimizer}: {large / sum(sizes):.0%} of the trained numbers have moments in "
            f"8 bits; tensors of fewer than {_SMALL:,} keep theirs in 32"
        )
    if section.optimizer.startswith("paged_") and not torch.cuda.is_available():
        said.append(f"{section.optimizer}: without a GPU there is nothing to page; memory is plain")
    return tuple(said)


_SECOND = "state2"
"""bitsandbytes' name of the second moment."""
_MOMENTS = {True: ("exp_avg", "exp_avg_sq"), False: ("state1", _SECOND)}
"""Names of both moments: torch's, and bitsandbytes'."""
_OF_CODES = ("qmap1", "qmap2", "absmax1", "absmax2")
"""What moments in 8-bit codes have besides: tables of codes, and a scale for each block."""


def factor(step: int, steps: int, section: OptimSection) -> float:
    """The share of the peak rate at `step`, counted from 1. No step has rate 0.

    Rises to 1 at the end of the warm-up, is 1 at the step after it, and would be 0 at steps + 1.
    """
    warm = round(section.warmup * steps)
    if step <= warm:
        return step / warm
    done = (step - 1 - warm) / (steps - warm)  # 0 at the first step after the warm-up
    return {"linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2, "constant": 1.0}[
        section.schedule
    ]


def set_rates(optimizer: Optimizer, share: float) -> None:
    """Sets every group to `share` of its peak rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def forgetting(optimizer: Optimizer) -> Callable[[nn.Parameter], None]:
    """A function that drops a parameter's moments: Adam begins anew with it."""

    def forget(p: nn.Parameter) -> None:
        optimizer.state.pop(p, None)

    return forget


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """All that the optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def rates(optimizer: Optimizer) -> Callable[[nn.Parameter], float]:
    """A function that tells the present rate of a parameter's group."""
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return lambda p: float(group_of[id(p)]["lr"])


def second_moments(optimizer: Optimizer) -> Callable[[nn.Parameter], Tensor]:
    """A function that tells Adam's second moment of a parameter, v_hat = v / (1 - beta_2^t).

    Raises:
        RecipeError: when called for moments that are stored in 8 bits.

    """
    beta_2: float = optimizer.defaults["betas"][1]

    def v_hat(p: nn.Parameter) -> Tensor:
        state = optimizer.state.get(p)
        if not state:  # it has had no gradient yet
            return torch.zeros_like(p)
        v: Tensor = state[_SECOND] if _SECOND in state else state["exp_avg_sq"]
        if v.dtype == torch.uint8:
            raise RecipeError(
                "train.optimizer: the variant reads second moments, which this one rounds to "
                "8 bits; take adamw or paged_adamw32bit."
            )
        return v / (1 - beta_2 ** int(state["step"]))

    return v_hat


def compact(optimizer: Optimizer, shrunk: Iterable[Shrunk], kept: Tensor) -> None:
    """Puts the new parameters in the place of the old, with the moments of the ranks kept.

    Raises:
        RecipeError: moments are stored in 8-bit blocks, which no single rank can be taken out of.

    """
    places = {
        id(p): (group, i) for group in optimizer.param_groups for i, p in enumerate(group["params"])
    }
    for old, new, axis in shrunk:
        state = optimizer.state.pop(old, {})
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        if any(value.dtype == torch.uint8 for value in tensors.values()):
            raise RecipeError(
                "adapter: blockwise 8-bit moments cannot be compacted, since a block spans ranks; "
                "turn compaction off, or take an optimizer with 32-bit moments."
            )
        group, i = places[id(old)]
        group["params"][i] = new
        optimizer.state[new] = state | {
            key: value.index_select(axis, kept.to(value.device))
            for key, value in tensors.items()
            if value.shape == old.shape
        }


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `classifier.weight.exp_avg`. No pickle needed.

    Counts become tensors of int64, and what parameters share, as the tables of 8-bit codes, is
    there for each.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value.clone() if isinstance(value, Tensor) else torch.tensor(value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `state_tensors`.

    A module that was never run, or that its variant has just rewritten, has no moments at all; an
    adapter's parameter that its variant does not train yet has none in any layer.

    Raises:
        ValueError: a parameter has none where others like it have, or not all that it should, or
            of another shape; or moments are of what is not trained. All such are named.

    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    layers = {name for name, module in model.named_modules() if isinstance(module, Adapter)}
    found: dict[str, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        found.setdefault(name, {})[key] = value
    if faults := list(_misfits(found, trained, layers, isinstance(optimizer, AdamW))):
        raise ValueError(several("moments of the optimizer", faults))
    for name, state in found.items():
        p = trained[name]
        for key, value in state.items():
            count = value.dtype == torch.int64
            optimizer.state[p][key] = int(value) if count else value.to(p.device)


def _misfits(
    found: Mapping[str, Mapping[str, Tensor]],
    trained: Mapping[str, nn.Parameter],
    layers: Container[str],
    by_torch: bool,
) -> Iterator[str]:
    """What is wrong with moments, by parameter."""
    places = [name.rpartition(".") for name in found]
    run, begun = {module for module, *_ in places}, {k for m, _, k in places if m in layers}
    moments = _MOMENTS[by_torch]
    for name, p in trained.items():
        state, (module, _, kind) = found.get(name, {}), name.rpartition(".")
        codes = any(value.dtype == torch.uint8 for value in state.values())
        wanted = ("step", *moments, *(_OF_CODES if codes else ()))
        if not state and module in run and (module not in layers or kind in begun):
            yield f"{name}: none"
        elif lacking := [key for key in wanted if key not in state] if state else []:
            yield f"{name}: no {', '.join(lacking)}"
        yield from (
            f"{name}: {key} is {tuple(state[key].shape)}, the parameter {tuple(p.shape)}"
            for key in moments
            if key in state and state[key].shape != p.shape
        )
    yield from (f"{name}: not trained" for name in sorted(found.keys() - trained.keys()))

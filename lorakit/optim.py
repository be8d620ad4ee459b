"""The optimizer, its parameter groups and the learning-rate schedule."""

from collections.abc import Callable, Iterable, Mapping
from math import cos, pi
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lorakit.adapter import Adapter, Shrunk
from lorakit.errors import RecipeError
from lorakit.schema import Section


class OptimSection(Section):
    """AdamW and its learning rate over the run."""

    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; biases, norms and gates have none."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up: to 0 just behind the last step, or not at all."""
    warmup: float = Field(0.06, ge=0.0, lt=1.0)
    """Share of the steps in which the rate rises from 0 to its peak."""


def adamw(model: nn.Module, layers: Mapping[str, Adapter], section: OptimSection) -> AdamW:
    """AdamW over all that is trainable in `model`; a layer's `optim()` overrides single parameters.

    Parameters of equal settings share a group, which keeps its peak rate under `peak`. Fused: one
    kernel for all parameters of a group.
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
    fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for p in model.parameters())
    return AdamW(list(groups.values()), fused=fused)


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
    """A function that tells Adam's second moment of a parameter, v_hat = v / (1 - beta_2^t)."""
    beta_2: float = optimizer.defaults["betas"][1]

    def v_hat(p: nn.Parameter) -> Tensor:
        state = optimizer.state.get(p)
        if not state:  # it has had no gradient yet
            return torch.zeros_like(p)
        v: Tensor = state["exp_avg_sq"]
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
        if any(value.dtype == torch.uint8 for value in state.values()):
            raise RecipeError(
                "adapter: blockwise 8-bit moments cannot be compacted, since a block spans ranks; "
                "turn compaction off, or take an optimizer with 32-bit moments."
            )
        group, i = places[id(old)]
        group["params"][i] = new
        optimizer.state[new] = {
            key: value.index_select(axis, kept.to(value.device))
            if value.shape == old.shape
            else value
            for key, value in state.items()
        }


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `classifier.weight.exp_avg`. No pickle needed."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        f"{names[id(p)]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_state_tensors(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `state_tensors`."""
    parameters = dict(model.named_parameters())
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        p = parameters[name]
        optimizer.state[p][key] = value.to(p.device)

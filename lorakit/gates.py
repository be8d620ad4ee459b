"""B-LoRA's settings: how hard gates are pushed shut, or how much is to be left, and of what.

The method itself is `variants/blora.py`. Here stands what a user may write and what contradicts
what.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorakit.codes import BITS
from lorakit.quantizer import THRESHOLD
from lorakit.schema import Section

INSTEAD = {"keep": "lambda_ranks", "bits": "lambda_bits"}
"""Targets, and the strength that each takes the place of."""
TARGETS = {strength: target for target, strength in INSTEAD.items()}


class Gates(Section):
    """How hard bits and ranks are pushed down, or how much is to be left, and when."""

    lambda_bits: NonNegativeFloat | None = 1e-3
    """What every doubling of a tensor's bits costs, in units of the task's loss."""
    lambda_ranks: NonNegativeFloat | None = 1e-2
    """What the ranks of a linear cost, all of them, in units of the task's loss."""
    keep: float | None = Field(None, gt=0.0, le=1.0, validate_default=True)
    """The share of ranks to be left after three quarters of the run, at any length of it; instead
    of `lambda_ranks`. Every linear keeps its first."""
    bits: float | None = Field(None, ge=BITS[0], le=BITS[-1], validate_default=True)
    """The mean bit-width to be left then, over all numbers of the adapter; instead of
    `lambda_bits`."""
    gate_init: float = Field(3.0, gt=THRESHOLD, le=10.0)
    """Logit of every gate at the start of their phase; one is closed below -0.94."""
    gate_lr: PositiveFloat | None = None
    """Peak learning rate of the logits that a `lambda` moves. null: by the length of their phase,
    so that a gate which nothing holds open is closed after a fifth to a third of it."""
    range_lr: PositiveFloat = 1e-2
    """Peak learning rate of the logarithms of the ranges."""
    warmup: float = Field(0.2, ge=0.0, lt=1.0)
    """Share of the run, at least one step, in which nothing is quantised and no gate moves."""
    freeze: float = Field(0.2, ge=0.0, lt=1.0, validate_default=True)
    """Share of the run, its end, in which gates stand thresholded and the rest trains on."""

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, given: Any) -> Any:
        """A strength that is not given is not meant where a target is."""
        if not isinstance(given, Mapping):
            return given
        targets = [target for target in INSTEAD if given.get(target) is not None]
        return {**dict.fromkeys(INSTEAD[target] for target in targets), **given}

    @field_validator(*INSTEAD)
    @classmethod
    def _one_or_the_other(cls, target: float | None, others: ValidationInfo) -> float | None:
        name = str(others.field_name)
        strength = INSTEAD[name]
        if strength not in others.data:
            return target  # at fault already
        if target is None and others.data[strength] is None:
            raise ValueError(f"give `{strength}` or `{name}`, one of them")
        if target is not None and others.data[strength] is not None:
            raise ValueError(
                f"a target finds out itself which gates to close, so `{strength}` would be "
                f"ignored; where the recipe names it, '~adapter.gates.{strength}' takes it out"
            )
        return target

    @field_validator("gate_lr")
    @classmethod
    def _moves_something(cls, rate: float | None, others: ValidationInfo) -> float | None:
        if rate is not None and all(others.data.get(name) is not None for name in INSTEAD):
            raise ValueError("without effect: `keep` and `bits` move their gates themselves")
        return rate

    @field_validator("freeze")
    @classmethod
    def _leaves_time_for_gates(cls, freeze: float, others: ValidationInfo) -> float:
        warmup = others.data.get("warmup", 0.0)
        if warmup + freeze >= 1:
            raise ValueError(
                f"warmup {warmup:g} and freeze {freeze:g} leave no step to the gates; together "
                "they are expected to be below 1"
            )
        return freeze


class Quantize(Section):
    """What is quantised besides the adapter; either leaves no plain pair to export."""

    weights: bool = False
    """The base weight of every adapted linear."""
    activations: bool = False
    """What enters the sum of base and update, what A and E give, and the sum."""


def closed(kind: str, state: str, strength: str) -> str:
    """What a person must know where all gates closed, and which setting to turn."""
    return (
        f"every {kind} gate closed: {state}. Lower adapter.gates.{strength} or gate_lr, let the "
        "weights learn first by a longer warmup, or say how much is to be left: "
        f"`{TARGETS[strength]}`."
    )


def unmoved(kind: str, state: str, strength: str) -> str:
    """The same where none did."""
    return (
        f"no {kind} gate closed: {state}. Raise adapter.gates.{strength}, or gate_lr if the run is "
        f"too short for them, or say how much is to be left: `{TARGETS[strength]}`."
    )

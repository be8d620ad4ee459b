"""How hard SoRA's gates are pushed towards 0, or how many are to be left: its settings.

The method itself is `variants/sora.py`. Here stands what a user may write and what contradicts
what, and how a run is cut into stages.
"""

from collections.abc import Mapping
from itertools import pairwise
from math import exp, log
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorakit.errors import RecipeError
from lorakit.schema import Section

Schedule = Literal["constant", "linear", "log-linear", "exp-linear"]

GROUNDS: Mapping[str, tuple[str, object, str]] = {
    "of": ("keep", None, "it is the unit of `keep`, which is not given"),
    "basis": ("keep", None, "it says which ranks die for `keep`, which is not given"),
    "l1": ("mode", "prox", "it belongs to `mode: reference`"),
    "floor": ("metric", "rate", "it belongs to `metric: adam`"),
    "start": ("schedule", "constant", "it belongs to a growing `schedule`"),
    "levels": ("schedule", "constant", "it belongs to a growing `schedule`"),
}
"""Settings that would be ignored where another has this value, and why."""


class Sparsity(Section):
    """How hard gates are pushed towards 0, or how many are to be left."""

    mode: Literal["prox", "reference"] = "prox"
    """The soft threshold, or the operator of the authors' code, which sends all below 2 xi to 0 and
    takes a constant `xi`."""
    metric: Literal["rate", "adam"] = "rate"
    """What scales `lambda` to a threshold: the gates' rate, or for each gate the step that Adam
    gives it, eta_t / (sqrt(v_hat) + eps); `lambda` is then the objective's."""
    lam: NonNegativeFloat | None = Field(2.0, alias="lambda")
    """The threshold is xi_t = eta_t lambda, with eta_t the gates' rate at step t; 0 leaves a gated
    LoRA. Under Adam a different scale from the objective's lambda: docs/methods.md."""
    xi: NonNegativeFloat | None = Field(None, validate_default=True)
    """A constant threshold for each step, whatever the rate; instead of `lambda`."""
    keep: float | None = Field(None, gt=0.0, le=1.0, validate_default=True)
    """The share to be left after three quarters of the run, which then goes on with what lives;
    instead of `lambda` or `xi`, at any length of the run."""
    of: Literal["ranks", "parameters"] = "ranks"
    """What `keep` is a share of; a rank has n + m parameters."""
    basis: Literal["principal", "own"] = "principal"
    """With `keep`, which ranks may die: principal axes of every update, into whose SVD the pair is
    rewritten when the first is due, with gates in proportion to singular values; or the ranks as
    they were trained, as in the paper."""
    l1: NonNegativeFloat = 0.0
    """With `mode: reference`, a term of the loss as well: l1 times the mean of |g| over all
    gates."""
    floor: NonNegativeFloat = 1e-9
    """With `metric: adam`, a gate has no threshold before its v_hat has come to this: while B = 0
    gates have no gradient, and the first step would kill them all."""
    gate_lr: PositiveFloat = 1e-2
    """The gates' peak learning rate; it follows the run's schedule."""
    gate_init: Literal["ones", "normal"] = "ones"
    """Gates start at 1, so that SoRA starts as LoRA, or as standard normals, as the authors' do."""
    schedule: Schedule | tuple[NonNegativeFloat, ...] = "constant"
    """How `lambda` or `xi` grows from `start`: in one stage, or in `levels` stages, each with a
    warm-up and a decay of its own, by equal steps, by equal steps of its exponential (log-linear),
    or by equal ratios (exp-linear). Or a list: its values in the stages before the last."""
    start: NonNegativeFloat = Field(0.0, validate_default=True)
    """Where a growing schedule begins; above 0 for exp-linear."""
    levels: PositiveInt = 7
    """How many values a growing schedule takes, both ends among them."""
    dense: float = Field(0.0, ge=0.0, lt=1.0)
    """The share of the run that a first stage without threshold takes. The other stages are equally
    long, and all are if this is 0."""
    retrain: bool = True
    """Whether the stages behind the first train the weights. false, as in the authors' code: they
    run at rate 0, and only `xi` moves gates."""
    revive: bool = Field(True, validate_default=True)
    """Whether dead gates may come back; left out, they may not with `keep` or `compact`."""
    compact: bool = False
    """Whether layers are rebuilt at their live rank in the middle of the run, each as soon as a
    quarter of it is dead. One process only."""

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, given: Any) -> Any:
        """What a setting says of others that are not given."""
        if not isinstance(given, Mapping):
            return given
        own_scale = given.get("mode") == "reference" or given.get("metric") == "adam"
        if own_scale or given.get("xi") is not None or given.get("keep") is not None:
            given = {"lambda": None, **given}
        if given.get("keep") is not None or given.get("compact") is True:
            given = {"revive": False, **given}
        return given

    @field_validator("xi")
    @classmethod
    def _one_strength(cls, xi: float | None, others: ValidationInfo) -> float | None:
        if xi is not None and others.data.get("lam") is not None:
            raise ValueError("give `lambda` or `xi`, one of them")
        if xi is None and others.data.get("mode") == "reference":
            raise ValueError("`mode: reference` takes a constant `xi`, in place of all else")
        if xi is not None and others.data.get("metric") == "adam":
            raise ValueError("`metric: adam` scales `lambda`; a constant xi is not scaled")
        return xi

    @field_validator("keep")
    @classmethod
    def _or_a_target(cls, keep: float | None, others: ValidationInfo) -> float | None:
        if not {"lam", "xi", "metric"} <= others.data.keys():
            return keep  # one of these is at fault already
        given = [n for n, key in (("lambda", "lam"), ("xi", "xi")) if others.data[key] is not None]
        if keep is None and not given:
            raise ValueError("give `lambda`, `xi` or `keep`, one of them")
        if keep is not None and given:
            raise ValueError(
                f"a target finds its thresholds itself, so `{given[0]}` would be ignored; where "
                f"the recipe names it, '~adapter.sparsity.{given[0]}' takes it out"
            )
        if keep is not None and others.data["metric"] == "adam":
            raise ValueError("a target finds its thresholds itself; `metric: adam` scales `lambda`")
        return keep

    @field_validator(*GROUNDS)
    @classmethod
    def _not_in_vain(cls, value: Any, others: ValidationInfo) -> Any:
        name = str(others.field_name)
        other, without, why = GROUNDS[name]
        off_default = value != cls.model_fields[name].default
        if off_default and other in others.data and others.data[other] == without:
            raise ValueError(f"without effect: {why}")
        return value

    @field_validator("start", "levels")
    @classmethod
    def _a_list_says_it_all(cls, value: float, others: ValidationInfo) -> float:
        off_default = value != cls.model_fields[str(others.field_name)].default
        if off_default and isinstance(others.data.get("schedule"), tuple):
            raise ValueError("without effect: `schedule` lists the values itself")
        return value

    @field_validator("schedule")
    @classmethod
    def _grows_to_the_end(cls, schedule: Any, others: ValidationInfo) -> Any:
        end = _end(others)
        if isinstance(schedule, tuple) and end is not None:
            values = [*schedule, end]
            if values != sorted(values):
                raise ValueError(f"expected numbers that grow, none above the end, {end:g}")
        return schedule

    @field_validator("schedule", "dense")
    @classmethod
    def _no_stages_to_a_target(cls, value: Any, others: ValidationInfo) -> Any:
        if others.data.get("keep") is not None and value not in ("constant", 0.0):
            raise ValueError("`keep` plans the run itself; stages go with `lambda` or `xi`")
        return value

    @field_validator("start")
    @classmethod
    def _below_the_end(cls, start: float, others: ValidationInfo) -> float:
        schedule, end = others.data.get("schedule"), _end(others)
        if schedule == "exp-linear" and start == 0:
            raise ValueError("exp-linear grows by a ratio, so `start` must be above 0")
        if schedule != "constant" and end is not None and start > end:
            raise ValueError(f"expected at most the end, {end:g}")
        return start

    @field_validator("levels")
    @classmethod
    def _enough_to_grow(cls, levels: int, others: ValidationInfo) -> int:
        if others.data.get("schedule") != "constant" and levels < 2:
            raise ValueError("a growing schedule takes at least 2 levels")
        return levels

    @field_validator("retrain")
    @classmethod
    def _something_moves_at_rest(cls, retrain: bool, others: ValidationInfo) -> bool:
        single = others.data.get("schedule") in ("constant", ())
        unstaged = single and others.data.get("dense") == 0
        if not retrain and unstaged:
            raise ValueError("false takes stages: a growing `schedule`, or a `dense` one")
        if not retrain and "xi" in others.data and others.data["xi"] is None:
            raise ValueError("false takes `xi`: lambda times a rate of 0 is no threshold")
        return retrain

    @field_validator("revive")
    @classmethod
    def _dead_for_a_target(cls, revive: bool, others: ValidationInfo) -> bool:
        if revive and others.data.get("keep") is not None:
            raise ValueError("what died for `keep` stays dead: false, or leave it out")
        return revive

    @field_validator("compact")
    @classmethod
    def _no_row_no_return(cls, compact: bool, others: ValidationInfo) -> bool:
        if compact and others.data.get("revive"):
            raise ValueError("takes `revive: false`, since a gate comes back into its own row")
        return compact

    @property
    def strength(self) -> float:
        """The end value of whichever of `lambda` and `xi` is given; 0 where `keep` is."""
        return (self.lam if self.xi is None else self.xi) or 0.0

    def values(self) -> list[float]:
        """One for each stage, the last of them `strength` (Algorithm 1's list of xi)."""
        grown = self._grown()
        return [0.0, *grown] if self.dense and grown[0] > 0 else grown

    def _grown(self) -> list[float]:
        a, b, count = self.start, self.strength, self.levels
        if isinstance(self.schedule, tuple):
            return [*self.schedule, b]
        if self.schedule == "constant":
            return [b]
        grid = [i / (count - 1) for i in range(count)]  # 0 to 1
        match self.schedule:
            case "linear":
                return [a + (b - a) * u for u in grid]
            case "log-linear":  # log((1 - u) e^a + u e^b), without overflow
                return [a, *(b + log(u + (1 - u) * exp(a - b)) for u in grid[1:])]
            case "exp-linear":
                return [a * (b / a) ** u for u in grid]

    def lengths(self, steps: int) -> list[int]:
        """A run of so many steps, cut into a stage for each value.

        Raises:
            RecipeError: there are more stages than steps.

        """
        count = len(self.values())
        if count > steps:
            raise RecipeError(
                f"adapter.sparsity: {count} stages do not fit into {steps} steps; train longer, or "
                "take fewer `levels`."
            )
        share = self.dense if self.dense and count > 1 else 1 / count
        first = min(max(1, round(share * steps)), steps - count + 1)
        ends = [first + (steps - first) * i // max(1, count - 1) for i in range(count)]
        return [end - begin for begin, end in pairwise([0, *ends])]


def _end(others: ValidationInfo) -> float | None:
    """What `lambda` or `xi` comes to, whichever is given."""
    given = (others.data.get(key) for key in ("lam", "xi"))
    return next((value for value in given if value is not None), None)

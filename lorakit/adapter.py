"""What an adapter is: a frozen linear map plus a trainable low-rank update.

    y = W x + b + dW x,    dW = B A

Symbols, used in this package and nowhere redefined (capitals: matrices; small: vectors, scalars)

    n, m   input and output width of the wrapped linear
    r      rank at the start, a ceiling;   k   live rank, 0 <= k <= r
    x      (..., n)  input                 W   (m, n)  frozen weight
    A      (r, n)    down-projection       B   (m, r)  up-projection
    g      (r,)      gates                 s   scale of the update, alpha / r

The scale is fixed at the start and never follows the live rank: ranks may die without rescaling
those that live.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, final

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import linear

from lorakit.base import device_of, widths
from lorakit.codes import CodedPair
from lorakit.errors import NotCodedError
from lorakit.schema import Section


class VariantConfig(Section):
    """The settings every variant has. A variant adds its own by subclassing."""

    variant: str
    """The method: the name of a file in `lorakit/variants/`."""
    rank: PositiveInt = 16
    """r: the rank every adapted linear starts with; a ceiling where ranks are learned."""
    alpha: PositiveFloat = 16.0
    """The update is scaled by s = alpha / rank, in every linear, whatever its own rank becomes."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the input of the update; the base model's own path is untouched."""
    targets: str | tuple[str, ...] = "all-linear"
    """The linears to adapt: `all-linear` (never the head or a language model's output layer), or
    names; a name is the end of a module's dotted name (`query`, `attention.output.dense`) or a
    regular expression for all of it."""
    exclude: tuple[str, ...] = ()
    """Names, as in `targets`, to leave out."""
    layers: str | None = Field(None, pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")
    """Blocks to adapt, counted from 0: `0-3,5`. null: all."""
    ranks: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Own start ranks, by name as in `targets`; 0 leaves a linear out. The scale stays."""
    also_train: tuple[str, ...] = ()
    """Modules to train and save whole besides the head, by the end of their dotted names."""
    init_from: str | None = None
    """A run, checkpoint or PEFT folder whose adapter and head training goes on from."""
    ranks_from: str | None = None
    """A run, checkpoint or PEFT folder whose ranks a fresh adapter starts with."""

    @property
    def scale(self) -> float:
        """s, the same for every linear."""
        return self.alpha / self.rank

    @property
    def weights_from(self) -> str | None:
        """The model whose W a start is taken from; None: the base itself."""
        return None


class Factors(NamedTuple):
    """The plain pair a layer reduces to: dW = B A, scales and gates folded in, dead ranks gone."""

    A: Tensor  # (k, n)
    B: Tensor  # (m, k)

    @property
    def rank(self) -> int:
        """k."""
        return self.A.shape[0]

    @property
    def parameters(self) -> int:
        """Numbers stored: k (n + m)."""
        return self.A.numel() + self.B.numel()


class Plan(NamedTuple):
    """What is decided for one linear before training."""

    rank: int  # r >= 1; a linear with rank 0 has no plan
    scale: float  # s
    start: Factors | None = None  # the pair to go on from; its own scale is folded in
    fresh: bool = True  # False: a checkpoint's tensors come next, a costly start is not computed
    weight: Callable[[], Tensor] | None = None  # W for a start, (m, n), where not the base's own


class Adapter(nn.Module, ABC):
    """A linear layer and its update. Subclasses say what the update is, and are final.

    Parameters are float32 whatever the base is stored in: a bfloat16 weight of size 1 cannot take
    a step below 2^-8.
    """

    ranked: ClassVar[Mapping[str, int]] = {}
    """Parameters and buffers with one slice a rank, and its axis: `{"A": 0, "B": 1}`. Layers that
    say so can be compacted."""

    def __init__(self, base: nn.Module, config: VariantConfig, plan: Plan) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.n, self.m = widths(base)
        self.r, self.scale = plan.rank, plan.scale
        self.dropout = nn.Dropout(config.dropout)

    @property
    def weight(self) -> Tensor:
        """The base's weight as it is stored: T5 looks at its precision."""
        stored: Tensor = self.base.weight  # type: ignore[assignment]
        return stored

    @final  # type: ignore[misc]  # nn.Module declares forward as an attribute
    def forward(self, x: Tensor) -> Tensor:
        """W x + b + dW x, for x (..., n) to (..., m), in the base's precision."""
        rows = x.reshape(-1, self.n)
        y = self.update(self.dropout(rows), self.base_output(rows))
        return self.finish(y).view(*x.shape[:-1], self.m)

    def base_output(self, x: Tensor) -> Tensor:
        """W x + b, for x (rows, n) to (rows, m). A variant that quantises W replaces it."""
        y: Tensor = self.base(x)
        return y

    @abstractmethod
    def update(self, x: Tensor, y: Tensor) -> Tensor:
        """y + dW x, for x (rows, n) and y (rows, m), computed in their precision."""

    def finish(self, y: Tensor) -> Tensor:
        """The last touch on the sum, (rows, m). One that quantises activations replaces it."""
        return y

    @abstractmethod
    def factors(self) -> Factors:
        """The plain pair (A, B) with B A equal to dW in evaluation, and dead ranks left out.

        Detached, in float32. Draws no random number and changes no state: it is called to look.

        Raises:
            NotLowRankError: no plain pair does what this layer does; the message says why.

        """

    def delta(self) -> Tensor:
        """dW itself, (m, n), in evaluation; detached, in float32."""
        pair = self.factors()
        return pair.B @ pair.A

    def coded(self) -> CodedPair:
        """The integer codes that this layer evaluates with, dead ranks left out; detached.

        A layer that answers computes by `coded_base`, `coded_update` and `gridded` in evaluation,
        so that codes on disk give the same output bit for bit.

        Raises:
            NotCodedError: its numbers are no codes.

        """
        raise NotCodedError(
            "there is nothing to pack: this adapter's numbers are float32, not integer codes; only "
            "a variant that learns bit-widths has codes."
        )

    def rank(self) -> int:
        """k, the live rank now."""
        return self.r

    def optim(self) -> Mapping[str, Mapping[str, float]]:
        """Optimizer settings of single parameters: `{"g": {"lr": 1e-2, "weight_decay": 0.0}}`.

        `lr` replaces the recipe's peak rate, `lr_scale` multiplies it.
        """
        return {}

    @final
    def compact(self, kept: Tensor) -> "list[Shrunk]":
        """Drops all ranks but `kept`, their numbers in ascending order. `r` stays what it was.

        Parameters are replaced by smaller ones, which an optimizer must be told of.
        """
        shrunk = []
        for name, axis in self.ranked.items():
            old = getattr(self, name)
            rows = old.detach().index_select(axis, kept.to(old.device))
            new = nn.Parameter(rows) if isinstance(old, nn.Parameter) else rows
            setattr(self, name, new)
            if isinstance(new, nn.Parameter):
                shrunk.append(Shrunk(old, new, axis))
        return shrunk

    @final
    def own_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen base: what a checkpoint holds of this layer."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}


class Shrunk(NamedTuple):
    """A parameter before and after a compaction."""

    old: nn.Parameter
    new: nn.Parameter
    axis: int
    """Of the two's ranks."""


def thin(x: Tensor, A: Tensor, B: Tensor, y: Tensor) -> Tensor:
    """y + B A x, for x (rows, n) and y (rows, m), through the rank: (rows, r) in between.

    The factors are cast to the precision of x, not x to theirs: they are small and x is not. Under
    a bfloat16 base that is mixed precision as autocast does it, with float32 weights behind it.
    Whatever scales the update belongs into B, which is smaller than the result. The second product
    adds to y: a sum after it would read and write the widest matrices once more, and made a step of
    MiniLM 1.03 to 1.07 x as long (bfloat16, 32 rows of 8 to 24 tokens, one core).
    """
    return torch.addmm(y, linear(x, A.to(x.dtype)), B.to(x.dtype).t())


def plain_parameters(base: nn.Module, plan: Plan) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B as LoRA starts them, A ~ U(-1/sqrt(n), 1/sqrt(n)) and B = 0, or from `plan.start`.

    The bound is Kaiming's with a = sqrt(5), the init of nn.Linear and of the LoRA authors' code
    (microsoft/LoRA, loralib/layers.py).
    """
    n, m = widths(base)
    A = torch.empty(plan.rank, n, device=device_of(base))
    B = torch.zeros(m, plan.rank, device=device_of(base))
    if plan.start is None:
        nn.init.kaiming_uniform_(A, a=5**0.5)
    else:
        A.copy_(plan.start.A)
        B.copy_(plan.start.B / plan.scale)
    return nn.Parameter(A), nn.Parameter(B)


class Stage(NamedTuple):
    """A part of a run with a warm-up and a decay of its own."""

    steps: int
    rate: float = 1.0
    """Its peak learning rates, as a share of the recipe's; 0 freezes the weights."""


def _nothing_to_forget(parameter: nn.Parameter) -> None:
    """Where there is no optimizer."""


@dataclass(frozen=True)
class Step:
    """What a controller is told about a step."""

    step: int
    """Counts from 1."""
    steps: int
    """How many the run has."""
    rate: Callable[[nn.Parameter], float]
    """The learning rate a parameter's group is moved with in this step."""
    stage: int = 0
    """Which of the controller's stages it is in; counts from 0."""
    moment: Callable[[nn.Parameter], Tensor] = torch.zeros_like
    """A parameter's second moment in Adam, v_hat, in its shape; 0 before its first gradient."""
    forget: Callable[[nn.Parameter], None] = _nothing_to_forget
    """Drops the optimizer's moments of a parameter that has been rewritten."""


L = TypeVar("L", bound=Adapter)
C = TypeVar("C", bound=VariantConfig)
Kept = Mapping[str, Tensor]
"""Layers to compact, by name, and the numbers of the ranks they keep."""


class Controller(Generic[L, C]):
    """What a variant does around the optimizer's step. This one does nothing.

    The loop calls it at fixed points, always, and never asks which variant it has. A variant may
    refuse here what only the run's length tells to be impossible, by a RecipeError.
    """

    def __init__(self, layers: Mapping[str, L], config: C, steps: int) -> None:
        self.layers, self.config, self.steps = layers, config, steps

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the run; their steps add up to `steps`."""
        return (Stage(self.steps),)

    def penalty(self) -> Tensor | None:
        """What is added to the loss of a step, once, however many batches it has."""

    def before_step(self, ctx: Step) -> None:
        """Called when the step's gradients are complete and not yet clipped."""

    def after_step(self, ctx: Step) -> Kept:
        """Called after the optimizer moved the weights, gradients still present."""
        return {}

    def compacts(self) -> bool:
        """Whether `after_step` may ask for compaction, for which a run must be one process."""
        return False

    def settled(self) -> bool:
        """Whether ranks have come to rest; until then no checkpoint is called the best."""
        return True

    def rewrote(self) -> bool:
        """Whether its last step has rewritten all it trains, and let the moments be forgotten."""
        return False

    def told(self) -> Mapping[str, Any]:
        """Numbers of its own for the log, as JSON has them; short, since a screen shows them."""
        return {}

    def ended(self) -> tuple[str, ...]:
        """What a person must know of how the run went, said loudly after the last step.

        Raises:
            LorakitError: the run did not do what the recipe asks for; its checkpoints stay.

        """
        return ()

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs to go on as if it had never stopped."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`; raises ValueError for what is none."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


class Promises(NamedTuple):
    """What a variant's adapters keep to. A law is asked of those that promise it."""

    exact_start: bool = True  # fresh, the model's output is the base model's bit for bit
    low_rank: bool = True  # factors() answers
    pair_ranks: int = 1  # ranks of the plain pair for each live rank
    exchangeable_ranks: bool = True  # permuting the ranks of a layer changes nothing


class Variant(NamedTuple):
    """A method, whole: its settings, its layer, and what it does around the step."""

    config: type[VariantConfig]
    layer: Callable[[nn.Module, Any, Plan], Adapter]
    controller: Callable[[Mapping[str, Any], Any, int], Controller[Any, Any]] = Controller
    promises: Promises = Promises()

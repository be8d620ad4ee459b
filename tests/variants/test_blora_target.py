"""B-LoRA's targets: the ranks and bits asked for are left, in time, at any run's length."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from planted import injected, net, pupil, section, taught
from pydantic import ValidationError
from torch import nn

from lorakit.adapter import Step
from lorakit.codes import BITS
from lorakit.errors import RecipeError
from lorakit.inject import Layers
from lorakit.quantizer import DEAD
from lorakit.variants.blora import BayesianGates, BLoRAConfig, Phase, bits_left

RANK = 16
RANKS = 2 * RANK


def config(rank: int = RANK, quantize: dict[str, bool] | None = None, **gates: Any) -> BLoRAConfig:
    given = {"variant": "blora", "rank": rank, "alpha": 2.0 * rank, "gates": gates}
    return BLoRAConfig.model_validate({**given, "quantize": quantize or {}})


def at(step: int, steps: int) -> Step:
    return Step(step, steps, lambda _: 0.1)


def ranks(layers: Layers) -> int:
    return sum(layer.rank() for layer in layers.values())


def mean_bits(layers: Layers) -> float:
    """Over all codes that would be stored."""
    parts = [part for layer in layers.values() for part in layer.coded().parts().values()]
    numbers = sum(part.codes.numel() for part in parts)
    return sum(part.bits * part.codes.numel() for part in parts) / numbers


def adrift(
    given: BLoRAConfig, steps: int, linears: int = 2
) -> tuple[Layers, BayesianGates, list[int], list[float], list[bool]]:
    """A run in which the loss asks for other gates at every step: ranks, bits, whether settled."""
    model = nn.Sequential(*(nn.Linear(16, 16 * (1 + i % 3)) for i in range(linears)))
    layers = injected(model, given)
    controller = BayesianGates(layers, given, steps)
    live, bits, settled = [], [], []
    for step in range(1, steps + 1):
        for layer in layers.values():
            for p in (layer.bit_logits, layer.rank_logits):
                p.grad = torch.randn_like(p)
        controller.before_step(at(step, steps))
        controller.after_step(at(step, steps))
        live.append(ranks(layers))
        bits.append(mean_bits(layers))
        settled.append(controller.settled())
    return layers, controller, live, bits, settled


# the run


@pytest.mark.parametrize(("keep", "steps"), [(0.7, 60), (0.1, 60), (0.3, 121)])
def test_the_share_of_ranks_is_left_at_any_length_of_the_run(keep: float, steps: int) -> None:
    """To the rank, by three quarters of the steps; and behind them none closes or opens."""
    _, _, live, _, settled = adrift(config(keep=keep), steps)
    assert live[-1] == round(keep * RANKS)
    assert len(set(live[3 * steps // 4 - 1 :])) == 1
    assert set(live[: steps // 4]) == {RANKS}
    assert max(a - b for a, b in pairwise(live)) <= max(1, RANKS // 20)
    assert settled.index(True) in (3 * steps // 4 - 1, steps - round(0.2 * steps) - 1)


@pytest.mark.parametrize("steps", [60, 101])
@pytest.mark.parametrize("bits", [2.0, 2.7, 12.0, 32.0])
def test_the_mean_of_bits_is_left_at_any_length_of_the_run(bits: float, steps: int) -> None:
    """To half of what the largest gate takes away: from 32 bits to 16, of the widest B."""
    layers, _, live, got, _ = adrift(config(bits=bits, rank=2), steps, linears=6)
    numbers = sum(2 * (layer.n + 1 + layer.m) for layer in layers.values())
    assert abs(got[-1] - bits) <= 8 * 2 * 48 / numbers
    assert len(set(got[4 * steps // 5 - 1 :])) == 1
    assert set(got[: steps // 4]) == {32.0}
    assert set(live) == {12}


def test_both_are_met_and_bits_are_those_of_the_ranks_that_live() -> None:
    _, controller, live, got, settled = adrift(config(keep=0.4, bits=3.5), 60, linears=4)
    assert live[-1] == round(0.4 * 4 * RANK)
    assert got[-1] == pytest.approx(3.5, abs=0.3)
    assert settled.index(True) == 44
    assert controller.ended() == ()


def test_numbers_of_ranks_that_are_gone_do_not_count() -> None:
    layers = injected(net(), config())
    with torch.no_grad():
        layers["up"].rank_logits[3:] = DEAD
    tally, start = (bits_left(layers.values(), 5.0, fresh) for fresh in (False, True))
    numbers = (4 + RANK) * (16 + 1 + 48)
    assert (tally.free, tally.left) == (2 * numbers, 5.0 * numbers)
    assert tally.gates[0].tolist() == [4 * 16 * rung for rung in (2, 4, 8, 16)]  # A of `up`
    assert start.whole == 32 * 2 * RANK * (16 + 1 + 48)


def test_what_trains_meets_its_target_too() -> None:
    settings = section(steps=60, lr=1e-2)
    trainee = pupil(config(keep=0.25, bits=2.0), settings)
    notes = taught(trainee, settings)
    assert ranks(trainee.layers) == 8
    assert mean_bits(trainee.layers) == 2.0
    assert notes.rows[-2]["bits"] == {"2": 6}
    assert trainee.controller.ended() == ()  # the floor is what was asked for


def test_the_survivors_stand_where_they_started_and_are_not_the_optimizers() -> None:
    settings = section(steps=60)
    trainee = pupil(config(keep=0.5, bits=8.0, gate_init=2.5), settings)
    taught(trainee, settings)
    for layer in trainee.layers.values():
        for logits in (layer.rank_logits, layer.bit_logits):
            assert set(logits.detach().flatten().tolist()) == {2.5, DEAD}
            assert not trainee.optimizer.state[logits]
        assert layer.phase == Phase.FROZEN


def test_where_one_target_is_given_its_strength_still_moves_the_other_gates() -> None:
    settings = section(steps=40)
    trainee = pupil(config(keep=0.5, lambda_bits=1.0), settings)
    taught(trainee, settings)
    assert ranks(trainee.layers) == RANKS // 2
    assert mean_bits(trainee.layers) == 2.0
    for layer in trainee.layers.values():
        assert set(layer.rank_logits.detach().tolist()) <= {3.0, DEAD}
        assert not {3.0, DEAD} & set(layer.bit_logits.detach().flatten().tolist())


def test_no_penalty_is_left_of_what_a_target_takes_the_place_of() -> None:
    for given, moved in (
        (config(keep=0.5), "bit_logits"),
        (config(bits=4.0), "rank_logits"),
    ):
        layers = injected(net(), given)
        controller = BayesianGates(layers, given, 60)
        for step in range(1, 13):
            controller.after_step(at(step, 60))
        penalty = controller.penalty()
        assert penalty is not None
        penalty.backward()
        layer = layers["up"]
        still = {"bit_logits", "rank_logits"} - {moved}
        assert getattr(layer, moved).grad.all()
        assert not getattr(layer, still.pop()).grad.any()


def test_ranks_whose_e_rounds_to_zero_count_as_gone() -> None:
    given = config(keep=0.5)
    layers = injected(net(), given)
    controller = BayesianGates(layers, given, 60)
    for step in range(1, 61):
        if step == 20:
            for layer in layers.values():
                with torch.no_grad():
                    layer.bit_logits[1] = DEAD
                    layer.E[:5] = 0.2  # of 1: below a third
        controller.after_step(at(step, 60))
    assert ranks(layers) == RANKS // 2
    assert sum(int(layer.open_ranks().sum()) for layer in layers.values()) == RANKS // 2 + 10


def worst_first(ways: Iterable[Any]) -> None:
    """Turns around what gates are told to be worth."""
    for way in ways:
        hear = way.hear

        def upside(hear: Any = hear, way: Any = way) -> None:
            hear()
            way.worth = -way.worth.abs()

        way.hear = upside


def test_gates_that_the_loss_asks_for_are_the_ones_to_keep() -> None:
    settings = section(steps=120, lr=1e-2)
    scores = []
    for turned in (False, True):
        torch.manual_seed(0)
        trainee = pupil(config(bits=3.0, keep=0.3), settings)
        if turned:
            worst_first(trainee.controller.closings.values())
        scores.append(taught(trainee, settings).scores()[-1])
    assert scores[0] < 0.8 * scores[1]


def test_a_resumed_controller_closes_what_the_other_would_have() -> None:
    ends = []
    for stop in (None, 31):
        torch.manual_seed(0)
        given = config(keep=0.3, bits=3.0)
        layers = injected(net(), given)
        controller = BayesianGates(layers, given, 60)
        for step in range(1, 61):
            for layer in layers.values():
                layer.bit_logits.grad = torch.randn_like(layer.bit_logits)
                layer.rank_logits.grad = torch.randn_like(layer.rank_logits)
            controller.before_step(at(step, 60))
            controller.after_step(at(step, 60))
            if step == stop:
                state = controller.state_dict()
                controller = BayesianGates(layers, given, 60)  # the layers are as they were left
                controller.load_state_dict(state)
        ends.append(
            [layer.open_ranks().tolist() + list(layer.bits().values()) for layer in layers.values()]
        )
    assert ends[0] == ends[1]


# what is refused


def test_fewer_ranks_than_linears_are_refused() -> None:
    given = config(keep=0.1, rank=4)
    with pytest.raises(RecipeError, match=r"adapter\.gates\.keep: 0\.1: the first rank .* 0\.25"):
        BayesianGates(injected(net(), given), given, 100)


@pytest.mark.parametrize("target", [{"keep": 0.1}, {"bits": 2.0}])
def test_a_run_too_short_for_its_gates_is_refused(target: dict[str, float]) -> None:
    given = config(warmup=0.7, freeze=0.1, **target)
    key = next(iter(target))
    with pytest.raises(RecipeError, match=rf"^adapter\.gates\.{key}: .* train longer"):
        BayesianGates(injected(net(), given), given, 60)


@pytest.mark.parametrize(
    ("gates", "where", "says"),
    [
        ({"keep": 0.5, "lambda_ranks": 1e-2}, "keep", "'~adapter.gates.lambda_ranks' takes it out"),
        ({"bits": 4.0, "lambda_bits": 0.0}, "bits", "'~adapter.gates.lambda_bits' takes it out"),
        ({"lambda_bits": None}, "bits", "give `lambda_bits` or `bits`"),
        ({"keep": 0.5, "bits": 4.0, "gate_lr": 0.1}, "gate_lr", "without effect"),
        ({"bits": 1.9}, "bits", "greater than or equal to 2"),
        ({"keep": 0.0}, "keep", "greater than 0"),
    ],
)
def test_what_contradicts_a_target_is_refused(gates: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        config(**gates)
    (fault,) = refusal.value.errors()
    assert fault["loc"] == ("gates", where)
    assert says in fault["msg"]


def test_all_contradictions_are_told_together() -> None:
    with pytest.raises(ValidationError) as refusal:
        config(keep=0.5, lambda_ranks=1.0, bits=4.0, lambda_bits=1.0, warmup=0.5, freeze=0.5)
    assert [fault["loc"][-1] for fault in refusal.value.errors()] == ["keep", "bits", "freeze"]


def test_bits_count_the_adapter_alone_so_more_to_quantise_takes_a_strength() -> None:
    with pytest.raises(ValidationError, match="counts the adapter's numbers alone"):
        config(bits=4.0, quantize={"weights": True})
    config(keep=0.5, quantize={"weights": True})


def test_a_target_survives_the_recipe_it_is_written_to() -> None:
    given = config(keep=0.5, bits=4.0)
    assert BLoRAConfig.model_validate(given.model_dump(by_alias=True)) == given
    assert given.gates.lambda_ranks is given.gates.lambda_bits is None
    assert BITS[0] <= 4.0 <= BITS[-1]

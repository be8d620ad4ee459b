"""What the paper says of SoRA, and of no other variant."""

from math import e, log
from typing import Any

import pytest
import torch
from planted import added, injected, net, pupil, section, taught
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.adapter import Plan, Step
from lorakit.errors import RecipeError
from lorakit.sparsity import Sparsity
from lorakit.train import place_of
from lorakit.variants.lora import LoRAConfig
from lorakit.variants.sora import ProximalGates, SoRAConfig, SoRALinear, soft_threshold


def config(**sparsity: Any) -> SoRAConfig:
    given = {"variant": "sora", "rank": 4, "alpha": 8.0, "sparsity": sparsity}
    return SoRAConfig.model_validate(given)


def gates(given: SoRAConfig) -> tuple[dict[str, Any], ProximalGates]:
    layers = injected(net(), given)
    return layers, ProximalGates(layers, given, steps=100)


def at(step: int, rate: float, steps: int = 100) -> Step:
    return Step(step, steps, lambda _: rate)


# the operator


def test_the_soft_threshold_is_the_proximal_map() -> None:
    """T_xi(u) = argmin_v (v - u)^2 / 2 + xi |v|, by brute force over a grid."""
    grid = torch.linspace(-4, 4, 8001)
    for u in torch.linspace(-3, 3, 25):
        best = grid[((grid - u).square() / 2 + 0.7 * grid.abs()).argmin()]
        assert_close(soft_threshold(u, 0.7), best, atol=1e-3, rtol=0)


def test_the_soft_threshold_by_hand() -> None:
    u = torch.tensor([-3.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0])
    want = torch.tensor([-2.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 2.0])
    assert_close(soft_threshold(u, 1.0), want)


def test_the_soft_threshold_is_odd_shrinks_and_never_stretches_a_distance() -> None:
    u, v = torch.randn(2, 1000)
    assert torch.equal(soft_threshold(-u, 0.3), -soft_threshold(u, 0.3))
    assert torch.equal(soft_threshold(u, 0.0), u)
    assert (soft_threshold(u, 0.3).abs() <= u.abs()).all()
    assert ((soft_threshold(u, 0.3) == 0) == (u.abs() <= 0.3)).all()
    moved = (soft_threshold(u, 0.3) - soft_threshold(v, 0.3)).abs()
    assert (moved <= (u - v).abs() + 1e-6).all()


def test_two_soft_thresholds_are_one_of_their_sum() -> None:
    u = torch.randn(1000)
    assert_close(soft_threshold(soft_threshold(u, 0.2), 0.3), soft_threshold(u, 0.5))


# the layer


def test_the_update_is_s_b_g_a() -> None:
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    nn.init.normal_(layer.g)
    x = torch.randn(3, 16)
    want = 2.0 * ((x @ layer.A.T) * layer.g) @ layer.B.T
    assert_close(added(layer, x), want)


def test_with_gates_at_one_it_is_lora_forward_and_backward() -> None:
    soft, plain = net(), net()
    sora = injected(soft, config())["up"]
    lora = injected(plain, LoRAConfig(variant="lora", rank=4, alpha=8.0))["up"]
    nn.init.normal_(sora.B)
    with torch.no_grad():
        lora.A.copy_(sora.A)
        lora.B.copy_(sora.B)
    x = torch.randn(5, 16)
    assert torch.equal(sora.g, torch.ones(4))
    assert_close(sora(x), lora(x))
    sora(x).square().sum().backward()
    lora(x).square().sum().backward()
    assert_close(sora.A.grad, lora.A.grad)
    assert_close(sora.B.grad, lora.B.grad)


def test_a_gate_at_zero_costs_a_rank_and_changes_nothing() -> None:
    """All gates, none, some, and negative ones."""
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    x = torch.randn(2, 16)
    for given in ([1.0, 0, -2, 0], [0.0, 0, 0, 0], [1.0, -1, 2, 0.5]):
        layer.g.data = torch.tensor(given)
        A, B = layer.factors()
        assert len(A) == layer.rank() == sum(value != 0 for value in given)
        assert_close(x @ A.T @ B.T, added(layer, x))


def test_pruning_keeps_the_scale_of_the_start() -> None:
    """alpha over the live rank would multiply the survivors by r / k."""
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    layer.g.data = torch.tensor([1.0, 0, 0, 0])
    _, B = layer.factors()
    assert_close(B[:, 0], 8.0 / 4 * layer.B[:, 0])


SIX = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
"""(n, m) of the linears in a block of DeBERTaV3-base: query, key, value and three more."""


@pytest.mark.parametrize(
    ("shapes", "numbers"),
    [
        (SIX, {1: 165_888, 2: 331_776, 4: 663_552, 8: 1_327_104, 16: 2_654_208, 32: 5_308_416}),
        (SIX[:3], {8: 442_368}),
        (SIX[:2], {8: 294_912, 16: 589_824}),
    ],
)
def test_the_linears_of_deberta_v3_base_have_as_many_numbers_as_the_authors_count(
    shapes: list[tuple[int, int]], numbers: dict[int, int]
) -> None:
    """12 blocks; gates are folded in, and not counted."""
    for rank, count in numbers.items():
        given = SoRAConfig(variant="sora", rank=rank)
        pairs = [SoRALinear(nn.Linear(n, m), given, Plan(rank, 1.0)).factors() for n, m in shapes]
        assert 12 * sum(pair.parameters for pair in pairs) == count


@pytest.mark.parametrize(("m", "square"), [(768, True), (3072, False)])
def test_a_dead_rank_counts_the_widths_of_its_own_layer(m: int, square: bool) -> None:
    """The authors take twice the hidden size for each, which is right for squares alone."""
    layer = SoRALinear(nn.Linear(768, m), config(), Plan(4, 1.0))
    layer.g.data = torch.tensor([1.0, 0.0, 0.0, 2.0])
    assert layer.factors().parameters == 2 * (768 + m)
    theirs = 4 * (768 + m) - 2 * 2 * 768
    assert (layer.factors().parameters == theirs) is square


def test_turning_a_gate_and_its_column_round_changes_nothing() -> None:
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    x = torch.randn(2, 16)
    before = added(layer, x)
    layer.g.data[1] *= -1
    layer.B.data[:, 1] *= -1
    assert_close(added(layer, x), before)


def test_a_dead_gate_has_a_gradient_and_its_rank_has_none() -> None:
    """So a gate can come back, as in the authors' code."""
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    layer.g.data[1] = 0.0
    layer(torch.randn(8, 16)).square().sum().backward()
    assert not layer.A.grad[1].any()
    assert not layer.B.grad[:, 1].any()
    assert layer.g.grad[1] != 0
    assert layer.A.grad[0].any()


def test_gates_start_at_one_or_normal() -> None:
    assert torch.equal(injected(net(), config())["up"].g, torch.ones(4))
    drawn = injected(net(), config(gate_init="normal"))["up"].g
    assert drawn.unique().numel() == 4
    assert not torch.equal(drawn, torch.ones(4))


def test_whatever_the_gates_are_a_fresh_adapter_is_its_base() -> None:
    layer, x = injected(net(), config(gate_init="normal"))["up"], torch.randn(3, 16)
    assert torch.equal(layer(x), layer.base(x))


# the step


def test_the_threshold_is_the_gates_own_rate_times_lambda() -> None:
    layers, controller = gates(config(**{"lambda": 2.0}))
    layers["up"].g.data.fill_(0.5)
    controller.after_step(at(1, rate=0.1))
    assert_close(layers["up"].g.data, torch.full((4,), 0.3))


def test_in_a_run_the_threshold_follows_the_gates_schedule_not_the_main_rate() -> None:
    """Where no gradient reaches a gate, it loses the sum of eta_t lambda and no more."""
    settings = section(steps=20, lr=1e-6, warmup=0.0)
    given = config(**{"lambda": 0.5, "gate_lr": 1e-2})
    trainee = pupil(given, settings)
    layer = trainee.layers["up"]
    layer.B.requires_grad_(False)  # stays 0, so gates have no gradient
    taught(trainee, settings)
    eta = sum(1e-2 * optim.factor(step, 20, settings) for step in range(1, 21))
    assert_close(layer.g.data, torch.full((4,), 1 - 0.5 * eta))


def test_a_constant_xi_is_the_threshold_whatever_the_rate() -> None:
    layers, controller = gates(config(xi=0.05))
    for step in range(1, 4):
        controller.after_step(at(step, rate=0.0))
    assert_close(layers["up"].g.data, soft_threshold(torch.ones(4), 3 * 0.05))


def test_a_larger_lambda_leaves_no_more_gates() -> None:
    settings = section(steps=60, lr=1e-2)
    live = []
    for strength in (0.0, 1.0, 2.0, 4.0, 8.0):
        trainee = pupil(config(**{"lambda": strength, "gate_lr": 0.05}), settings)
        taught(trainee, settings)
        live.append(sum(layer.rank() for layer in trainee.layers.values()))
    assert live == sorted(live, reverse=True)
    assert live[0] == 8
    assert live[-1] < 8


def test_without_lambda_gates_are_trained_by_adam_alone() -> None:
    settings = section(steps=10)
    trainee = pupil(config(**{"lambda": 0.0}), settings)
    twin = pupil(config(**{"lambda": 0.0}), settings)
    with torch.no_grad():
        for name, layer in twin.layers.items():
            layer.A.copy_(trainee.layers[name].A)
    taught(trainee, settings)
    ungated = twin.controller.after_step
    twin.controller.after_step = lambda ctx: None
    taught(twin, settings)
    assert ungated is not None
    for name, layer in twin.layers.items():
        assert torch.equal(layer.g, trainee.layers[name].g)


def test_under_adam_a_steady_gradient_moves_a_gate_by_its_rate_however_weak_it_is() -> None:
    """Why lambda here is not the objective's: a gradient of 1e-4 holds a gate as well as 1e4."""
    for size in (1e-4, 1e4):
        gate = nn.Parameter(torch.ones(1))
        optimizer = torch.optim.AdamW([gate], lr=1e-2, weight_decay=0.0)
        gate.grad = torch.full((1,), size)
        optimizer.step()
        assert_close(gate.data, torch.tensor([0.99]), atol=1e-4, rtol=0)


def test_under_plain_gradient_descent_lambda_is_the_objectives() -> None:
    """sum a (g - c)^2 / 2 + lambda |g|_1 has its minimum at T_{lambda / a}(c); and it is found."""
    a, c = torch.tensor([0.5, 1.0, 4.0, 4.0]), torch.tensor([0.9, -2.0, 0.2, -1.5])
    given = config(**{"lambda": 1.0})
    layers = injected(net(), given)
    controller, g = ProximalGates({"up": layers["up"]}, given, 200), layers["up"].g
    for step in range(1, 201):
        g.data -= 0.1 * a * (g.data - c)
        controller.after_step(at(step, rate=0.1))
    assert_close(g.data, soft_threshold(c, 1.0 / a))


def test_gates_have_their_own_rate_and_no_weight_decay() -> None:
    model = net()
    layers = injected(model, config(gate_lr=3e-2))
    optimizer = optim.adamw(model, layers, section(lr=1e-3, weight_decay=0.1))
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    layer = layers["up"]
    assert (of[id(layer.g)]["peak"], of[id(layer.g)]["weight_decay"]) == (3e-2, 0.0)
    assert (of[id(layer.A)]["peak"], of[id(layer.A)]["weight_decay"]) == (1e-3, 0.1)


def test_ranks_are_settled_when_no_gate_has_died_or_come_back_for_a_tenth_of_the_run() -> None:
    layers, controller = gates(config(xi=1e-9))
    seen = []
    for step in range(1, 31):
        if step == 5:
            layers["up"].g.data[0] = 0.0
        if step == 18:
            layers["up"].g.data[0] = 0.4
        controller.after_step(at(step, rate=0.0))
        seen.append(controller.settled())
    quiet = [step for step, settled in enumerate(seen, start=1) if settled]
    assert quiet == [15, 16, 17, 28, 29, 30]


def test_a_resumed_run_knows_how_long_ranks_have_been_at_rest() -> None:
    layers, controller = gates(config(xi=1e-9))
    with torch.no_grad():
        next(iter(layers.values())).g[0] = 0.0
    for step in range(1, 12):
        controller.after_step(at(step, 1e-2))
    assert controller.settled()
    _, resumed = gates(config(xi=1e-9))
    assert not resumed.settled()
    resumed.load_state_dict(controller.state_dict())
    assert resumed.settled()
    assert (resumed.step, resumed.moved) == (11, 1)


def test_before_the_first_gate_dies_ranks_are_not_settled_unless_nothing_pushes_them() -> None:
    for xi, settled in ((1e-9, False), (0.0, True)):
        _, controller = gates(config(xi=xi))
        for step in range(1, 51):
            controller.after_step(at(step, rate=0.0))
        assert controller.settled() == settled


# the schedule


def test_schedules_grow_by_equal_steps_equal_exponentials_or_equal_ratios() -> None:
    def values(schedule: str, **given: float) -> list[float]:
        grown = {"lambda": 4.0, "levels": 3, "schedule": schedule, **given}
        return Sparsity.model_validate(grown).values()

    assert Sparsity.model_validate({"lambda": 4.0}).values() == [4.0]
    assert values("linear") == pytest.approx([0.0, 2.0, 4.0])
    assert values("log-linear") == pytest.approx([0.0, log((1 + e**4) / 2), 4.0])
    assert values("exp-linear", start=1.0) == pytest.approx([1.0, 2.0, 4.0])


def test_the_authors_list_for_rte_is_the_linear_schedule_of_seven_xi() -> None:
    """scripts of TsinghuaC3I/SoRA: from 0 to 7e-4 in 7 values."""
    got = Sparsity.model_validate({"xi": 7e-4, "schedule": "linear"}).values()
    assert got == pytest.approx(
        [0, 1.1667e-4, 2.3333e-4, 3.5e-4, 4.6667e-4, 5.8333e-4, 7e-4], rel=1e-4
    )


def test_a_list_is_a_schedule_of_its_own() -> None:
    """Algorithm 1's list of xi: what comes before the end."""
    given = config(xi=0.2, schedule=(0.0, 0.05))
    assert given.sparsity.values() == [0.0, 0.05, 0.2]
    assert lost(given, 9) == [0.0] * 3 + [0.05] * 3 + [0.2] * 3
    assert lost(config(xi=0.2, schedule=(0.05,), dense=0.5), 8) == pytest.approx(
        [0.0] * 4 + [0.05] * 2 + [0.2] * 2
    )
    assert config(xi=0.2, schedule=()).sparsity.values() == [0.2]


def test_a_large_log_linear_schedule_does_not_overflow() -> None:
    got = Sparsity.model_validate({"lambda": 2000.0, "schedule": "log-linear"}).values()
    assert got[-1] == 2000.0
    assert got == sorted(got)


def lost(given: SoRAConfig, steps: int) -> list[float]:
    """By how much each step pushes a gate that no gradient moves."""
    layers = injected(net(), given)
    controller = ProximalGates(layers, given, steps)
    losses, gate = [], layers["up"].g.data
    for step in range(1, steps + 1):
        before, place = float(gate[0]), place_of(step, controller.stages())
        controller.after_step(Step(step, steps, lambda _: 0.0, place.number))
        losses.append(round(before - float(gate[0]), 6))
    return losses


def test_every_value_of_a_growing_schedule_has_a_stage_of_its_own() -> None:
    given = config(xi=0.2, schedule="linear", levels=3)
    assert lost(given, 9) == [0.0] * 3 + [0.1] * 3 + [0.2] * 3


def test_the_dense_stage_is_the_schedules_own_zero_or_comes_before_it() -> None:
    grown = {"xi": 0.2, "schedule": "linear", "levels": 3}
    assert lost(config(**grown, dense=0.5), 8) == [0.0] * 4 + [0.1] * 2 + [0.2] * 2
    assert lost(config(**grown, start=0.1, dense=0.4), 10) == pytest.approx(
        [0.0] * 4 + [0.1] * 2 + [0.15] * 2 + [0.2] * 2
    )
    assert lost(config(xi=0.1, dense=0.5), 4) == [0.0] * 2 + [0.1] * 2
    assert lost(config(xi=0.0, dense=0.5), 4) == [0.0] * 4


def test_fifty_epochs_and_six_times_fifteen_are_the_authors_stages_for_rte() -> None:
    """scripts of TsinghuaC3I/SoRA, in epochs; 15 is a constant of their code."""
    given = config(xi=7e-4, schedule="linear", dense=50 / 140)
    stages = ProximalGates(injected(net(), given), given, 140).stages()
    assert [(stage.steps, stage.rate) for stage in stages] == [(50, 1.0)] + [(15, 1.0)] * 6


@pytest.mark.parametrize("steps", [7, 8, 50, 999])
@pytest.mark.parametrize("dense", [0.0, 0.01, 0.4, 0.99])
def test_stages_add_up_to_the_run_and_none_is_empty(dense: float, steps: int) -> None:
    given = config(xi=0.1, schedule="linear", levels=7, dense=dense)
    lengths = [s.steps for s in ProximalGates(injected(net(), given), given, steps).stages()]
    assert len(lengths) == 7
    assert sum(lengths) == steps
    assert min(lengths) >= 1
    assert max(lengths[1:]) - min(lengths[1:]) <= 1


def test_every_stage_warms_up_and_decays_by_itself() -> None:
    settings = section(steps=30, warmup=0.2, log_every=1)
    trainee = pupil(config(**{"lambda": 1.0, "schedule": "linear", "levels": 3}), settings)
    rates = [row["lr"] for row in taught(trainee, settings).rows if "ranks" in row]
    assert rates == pytest.approx([3e-2 * optim.factor(s, 10, settings) for s in range(1, 11)] * 3)


def test_without_retraining_the_later_stages_only_shrink_gates() -> None:
    """As the authors' scheduler does, whose learning-rate schedule is spent by then."""
    settings = section(steps=20, log_every=10)
    given = config(xi=0.01, schedule="linear", levels=2, retrain=False)
    trainee = pupil(given, settings)
    seen = {}

    def after_step(ctx: Step) -> Any:
        kept = ProximalGates.after_step(trainee.controller, ctx)
        if ctx.step in (10, 20):
            seen[ctx.step] = {n: v.clone() for n, v in trainee.layers["up"].own_state().items()}
        return kept

    trainee.controller.after_step = after_step
    taught(trainee, settings)
    assert torch.equal(seen[20]["A"], seen[10]["A"])
    assert torch.equal(seen[20]["B"], seen[10]["B"])
    assert_close(seen[20]["g"], soft_threshold(seen[10]["g"], 10 * 0.01))


def test_more_stages_than_steps_are_refused() -> None:
    given = config(xi=0.1, schedule="linear", levels=7)
    layers = injected(net(), given)
    with pytest.raises(RecipeError, match=r"^adapter.sparsity: 7 stages do not fit into 6 steps"):
        ProximalGates(layers, given, steps=6)
    assert len(ProximalGates(layers, given, steps=7).stages()) == 7


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lambda": 1.0, "xi": 0.1}, "one of them"),
        ({"lambda": None}, "one of them"),
        ({"lambda": 1.0, "keep": 0.3}, "finds its thresholds itself, so `lambda`"),
        ({"xi": 0.1, "keep": 0.3}, "finds its thresholds itself, so `xi`"),
        ({"keep": 0.3, "metric": "adam"}, "`metric: adam` scales `lambda`"),
        ({"keep": 0.3, "mode": "reference"}, "takes a constant `xi`"),
        ({"keep": 0.3, "schedule": "linear"}, "plans the run itself"),
        ({"keep": 0.3, "dense": 0.3}, "plans the run itself"),
        ({"keep": 0.3, "revive": True}, "stays dead"),
        ({"keep": 0.0}, "greater than 0"),
        ({"keep": 1.1}, "less than or equal to 1"),
        ({"of": "parameters"}, "the unit of `keep`"),
        ({"mode": "reference"}, "takes a constant `xi`"),
        ({"mode": "reference", "lambda": 1.0}, "takes a constant `xi`"),
        ({"l1": 10.0}, "belongs to `mode: reference`"),
        ({"mode": "reference", "xi": 0.1, "l1": -1.0}, "greater than or equal to 0"),
        ({"metric": "adam"}, "one of them"),
        ({"metric": "adam", "xi": 0.1}, "a constant xi is not scaled"),
        ({"floor": 1e-6}, "belongs to `metric: adam`"),
        ({"metric": "adam", "lambda": 1.0, "floor": -1e-6}, "greater than or equal to 0"),
        ({"start": 1.0}, "belongs to a growing"),
        ({"levels": 3}, "belongs to a growing"),
        ({"dense": 1.0}, "less than 1"),
        ({"retrain": False, "xi": 0.1}, "takes stages"),
        ({"retrain": False, "schedule": "linear"}, "no threshold"),
        ({"compact": True, "revive": True}, "its own row"),
        ({"gate_lr": 0.0}, "greater than 0"),
        ({"schedule": "exp-linear"}, "above 0"),
        ({"schedule": "linear", "start": 3.0}, "at most the end, 2"),
        ({"schedule": "linear", "levels": 1}, "at least 2"),
        ({"xi": 0.1, "schedule": (0.0, 0.2)}, "none above the end, 0.1"),
        ({"xi": 0.1, "schedule": (0.05, 0.0)}, "numbers that grow"),
        ({"schedule": (0.5, 1.0), "levels": 3}, "lists the values itself"),
        ({"schedule": (0.5, 1.0), "start": 0.5}, "lists the values itself"),
        ({"keep": 0.3, "schedule": (0.5,)}, "plans the run itself"),
        ({"xi": 0.1, "schedule": (), "retrain": False}, "takes stages"),
        ({"lambda": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Sparsity.model_validate(given)


def test_xi_alone_takes_the_place_of_lambda() -> None:
    given = Sparsity.model_validate({"xi": 3e-4})
    assert (given.lam, given.xi, given.strength) == (None, 3e-4, 3e-4)


def test_what_is_left_out_follows_from_what_is_given() -> None:
    def filled(**given: Any) -> tuple[float | None, bool]:
        settings = Sparsity.model_validate(given)
        return settings.lam, settings.revive

    assert filled() == (2.0, True)
    assert filled(keep=0.3) == (None, False)
    assert filled(compact=True) == (2.0, False)
    assert filled(mode="reference", xi=1e-3) == (None, True)


@pytest.mark.parametrize(
    "given",
    [{}, {"keep": 0.3}, {"compact": True}, {"mode": "reference", "xi": 1e-3, "l1": 10.0}],
)
def test_settings_written_out_whole_are_read_back_the_same(given: dict[str, Any]) -> None:
    """As a run's folder holds them."""
    settings = Sparsity.model_validate(given)
    assert Sparsity.model_validate(settings.model_dump()) == settings

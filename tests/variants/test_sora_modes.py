"""SoRA's other operators: the authors' own, and the proximal map in Adam's metric."""

from typing import Any

import pytest
import torch
from planted import injected, net, pupil, section, taught
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.adapter import Step
from lorakit.variants.sora import (
    ProximalGates,
    SoRAConfig,
    reference_threshold,
    soft_threshold,
)


def config(**sparsity: Any) -> SoRAConfig:
    given = {"variant": "sora", "rank": 4, "alpha": 8.0, "sparsity": sparsity}
    return SoRAConfig.model_validate(given)


# the authors' operator


def theirs(u: Tensor, xi: float) -> Tensor:
    """What the notes say of it: three edits in turn, each seeing what the one before left."""
    u = u.clone()
    u[u > xi] -= xi
    u[u < -xi] += xi
    u[u.abs() < xi] = 0.0
    return u


def test_the_reference_operator_is_three_edits_in_turn_in_closed_form() -> None:
    u = torch.randn(10_000)
    for xi in (0.0, 1e-3, 0.3, 2.0):
        assert_close(reference_threshold(u, xi), theirs(u, xi))


def test_the_reference_operator_has_twice_the_dead_zone_of_the_soft_threshold() -> None:
    u = torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 1.999, 2.0, 2.5])
    want = torch.tensor([-1.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.5])
    assert_close(reference_threshold(u, 1.0), want)
    differ = reference_threshold(u, 1.0) != soft_threshold(u, 1.0)
    assert torch.equal(differ, (u.abs() > 1.0) & (u.abs() < 2.0))


def test_reference_mode_pushes_by_a_constant_through_their_operator() -> None:
    given = config(mode="reference", xi=0.3)
    layers = injected(net(), given)
    layers["up"].g.data = torch.tensor([-1.0, 0.5, 0.7, 0.2])
    ProximalGates(layers, given, 10).after_step(Step(1, 10, lambda _: 0.0))
    assert_close(layers["up"].g.data, torch.tensor([-0.7, 0.0, 0.4, 0.0]))


def test_their_l1_term_is_a_mean_over_all_gates_of_all_layers() -> None:
    given = config(mode="reference", xi=0.0, l1=10.0, gate_init="normal")
    layers = injected(net(), given, ranks={"up": 3, "down": 5})
    penalty = ProximalGates(layers, given, 10).penalty()
    assert penalty is not None
    gates = torch.cat([layer.g for layer in layers.values()])
    assert_close(penalty, 10.0 * gates.abs().mean())
    penalty.backward()
    assert_close(layers["up"].g.grad, 10.0 / 8 * layers["up"].g.detach().sign())
    assert ProximalGates(layers, config(), 10).penalty() is None


def test_a_rank_that_was_compacted_away_still_counts_in_the_mean() -> None:
    given = config(mode="reference", xi=0.1, l1=4.0, compact=True)
    layers = injected(net(), given)
    controller = ProximalGates(layers, given, 10)
    layers["up"].g.data = torch.tensor([2.0, 0.0, 0.0, 1.0])
    before = controller.penalty()
    layers["up"].compact(torch.tensor([0, 3]))
    assert_close(controller.penalty(), before)


def test_the_l1_term_kills_gates_that_the_operator_alone_would_leave() -> None:
    settings = section(steps=60, lr=1e-2)
    live = []
    for l1 in (0.0, 30.0):
        trainee = pupil(config(mode="reference", xi=1e-3, l1=l1, gate_lr=0.05), settings)
        taught(trainee, settings)
        live.append(sum(layer.rank() for layer in trainee.layers.values()))
    assert live[1] < live[0]


# Adam's metric


def test_in_adams_metric_a_quadratic_comes_to_rest_at_the_soft_threshold_of_its_minimum() -> None:
    """sum a (g - c)^2 / 2 + lambda |g|_1 has its minimum at T_{lambda / a}(c); and it is found."""
    a, c = torch.tensor([0.5, 1.0, 4.0, 4.0]), torch.tensor([0.9, -2.0, 0.2, -1.5])
    given = config(metric="adam", **{"lambda": 1.0})
    layers = injected(net(), given)
    g = layers["up"].g
    controller = ProximalGates({"up": layers["up"]}, given, 3000)
    optimizer = torch.optim.AdamW([g], lr=1e-2, weight_decay=0.0)
    moment = optim.second_moments(optimizer)
    for step in range(1, 3001):
        rate = optimizer.param_groups[0]["lr"] = 1e-2 * (1 - (step - 1) / 3000)
        g.grad = a * (g.detach() - c)
        optimizer.step()
        controller.after_step(Step(step, 3000, lambda _, rate=rate: rate, 0, moment))
    want = soft_threshold(c, 1.0 / a)
    assert_close(g.data, want, atol=1e-3, rtol=0)
    assert torch.equal(g.data == 0, want == 0)


def test_the_threshold_is_lambda_times_the_step_that_adam_gives_each_gate() -> None:
    given = config(metric="adam", **{"lambda": 1e-3, "floor": 1e-6})
    layers = injected(net(), given)
    v_hat = torch.tensor([1.0, 1e-2, 1e-6, 0.99e-6])
    moment = {id(layer.g): v_hat for layer in layers.values()}
    ctx = Step(1, 10, lambda _: 0.1, 0, lambda p: moment[id(p)])
    ProximalGates(layers, given, 10).after_step(ctx)
    want = 1 - torch.tensor([1e-4, 1e-3, 1e-1, 0.0])  # the last is below the floor
    assert_close(layers["up"].g.data, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("floor", "live"), [(1e-9, 8), (0.0, 0)])
def test_at_the_first_step_gates_have_no_gradient_and_without_the_floor_all_die(
    floor: float, live: int
) -> None:
    settings = section(steps=1, warmup=0.0)
    trainee = pupil(config(metric="adam", floor=floor, **{"lambda": 1e-3}), settings)
    taught(trainee, settings)
    assert sum(layer.rank() for layer in trainee.layers.values()) == live


def test_with_the_floor_some_gates_die_later_and_some_live() -> None:
    settings = section(steps=100, lr=1e-2)
    trainee = pupil(config(metric="adam", gate_lr=0.05, **{"lambda": 0.01}), settings)
    taught(trainee, settings)
    assert 0 < sum(layer.rank() for layer in trainee.layers.values()) < 8


def test_the_moment_the_loop_tells_is_adams_own_bias_corrected() -> None:
    """After one step it is the gradient squared; before any, 0."""
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    moment = optim.second_moments(optimizer)
    assert torch.equal(moment(p), torch.zeros(3))
    assert not optimizer.state
    p.grad = torch.tensor([1.0, -2.0, 3.0])
    optimizer.step()
    assert_close(moment(p), p.grad.square())

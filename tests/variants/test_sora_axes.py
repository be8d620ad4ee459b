"""SoRA's target on principal axes: what turning a layer keeps, and which ranks then die."""

from typing import Any

import pytest
import torch
from planted import injected, net, pupil, section, taught
from torch.testing import assert_close

from lorakit import prune
from lorakit.adapter import Step
from lorakit.variants.sora import GatesToTarget, SoRAConfig, SoRALinear, controller

STEPS = 100


def config(keep: float, **sparsity: Any) -> SoRAConfig:
    given = {"keep": keep, "gate_lr": 0.03, **sparsity}
    return SoRAConfig.model_validate(
        {"variant": "sora", "rank": 8, "alpha": 16.0, "sparsity": given}
    )


@torch.no_grad()
def trained(given: SoRAConfig) -> dict[str, SoRALinear]:
    """Layers somewhere in a run: nothing is orthogonal, gates differ, one is negative."""
    layers = injected(net(), given)
    for layer in layers.values():
        layer.B.normal_()
        layer.g.uniform_(0.5, 1.5)
        layer.g[3] = -0.7
    return layers


def at(step: int, forgotten: list[Any] | None = None) -> Step:
    """A step at rate 0."""
    kept = [] if forgotten is None else forgotten
    return Step(step, STEPS, lambda _: 0.0, forget=kept.append)


def turned(layers: dict[str, SoRALinear], given: SoRAConfig) -> GatesToTarget:
    push = controller(layers, given, STEPS)
    assert isinstance(push, GatesToTarget)
    push.sparsity = given.sparsity
    push.target = push.target._replace(first=1, last=10**9)  # nobody is due yet
    push.after_step(at(1))
    return push


def test_turning_changes_no_update() -> None:
    given = config(0.5)
    layers = trained(given)
    before = {name: layer.delta() for name, layer in layers.items()}
    turned(layers, given)
    for name, layer in layers.items():
        assert_close(layer.delta(), before[name], rtol=1e-5, atol=1e-5)


def test_gates_are_then_singular_values_in_one_unit_and_one_in_the_mean() -> None:
    given = config(0.5)
    layers = trained(given)
    spectra = {n: torch.linalg.svdvals(layer.delta())[: layer.r] for n, layer in layers.items()}
    turned(layers, given)
    gates = torch.cat([layer.g.data for layer in layers.values()])
    assert float(gates.mean()) == pytest.approx(1.0)
    assert_close(gates / gates[0], torch.cat([*spectra.values()]) / spectra["up"][0])


def test_rows_of_a_and_columns_of_b_are_then_orthogonal_and_of_one_size() -> None:
    given = config(0.5)
    layers = trained(given)
    turned(layers, given)
    size = float(layers["up"].A.data[0].square().sum())
    for layer in layers.values():
        assert_close(layer.A.data @ layer.A.data.T, size * torch.eye(layer.r), rtol=0, atol=1e-4)
        assert_close(layer.B.data.T @ layer.B.data, size * torch.eye(layer.r), rtol=0, atol=1e-4)


def test_the_moments_of_what_was_rewritten_are_forgotten_once() -> None:
    given = config(0.5)
    layers = trained(given)
    push, forgotten = controller(layers, given, STEPS), []
    for step in range(1, STEPS + 1):
        push.after_step(at(step, forgotten))
    rewritten = [p for layer in layers.values() for p in (layer.A, layer.B, layer.g)]
    assert [id(p) for p in forgotten] == [id(p) for p in rewritten]


def test_a_pair_that_has_learnt_nothing_is_not_turned() -> None:
    given = config(0.5)
    layers = injected(net(), given)  # B = 0
    before = {name: layer.A.data.clone() for name, layer in layers.items()}
    turned(layers, given)
    for name, layer in layers.items():
        assert torch.equal(layer.A.data, before[name])
        assert torch.equal(layer.g.data, torch.ones(layer.r))


@pytest.mark.parametrize("keep", [0.75, 0.5, 0.25])
def test_where_nothing_is_learnt_on_the_way_the_pruned_lora_is_left(keep: float) -> None:
    """At rate 0 the target drops the smallest singular values over all modules, as `prune` does."""
    given = config(keep)
    layers = trained(given)
    start = {name: layer.r for name, layer in layers.items()}
    rival = prune.cut(prune.plain(layers), prune.Selection(keep=keep), start)
    push = controller(layers, given, STEPS)
    for step in range(1, STEPS + 1):
        push.after_step(at(step))
    for name, layer in layers.items():
        A, B = rival.pairs[name]
        assert layer.rank() == rival.pairs[name].rank
        assert_close(layer.delta(), B @ A, rtol=1e-4, atol=1e-5)


def test_in_their_own_basis_the_ranks_stay_what_they_are() -> None:
    given = config(0.5, basis="own")
    layers = trained(given)
    before = {name: layer.A.data.clone() for name, layer in layers.items()}
    push = controller(layers, given, STEPS)
    for step in range(1, STEPS + 1):
        push.after_step(at(step))
    for name, layer in layers.items():
        assert torch.equal(layer.A.data, before[name])


def test_adam_begins_anew_with_what_was_turned() -> None:
    settings = section(steps=40)
    trainee = pupil(config(0.5), settings)
    taught(trainee, settings)
    first = trainee.controller.target.first
    for layer in trainee.layers.values():
        for p in (layer.A, layer.B, layer.g):
            assert int(trainee.optimizer.state[p]["step"]) == 40 - first

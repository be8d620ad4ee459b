"""Dead ranks of SoRA: held at 0 or free to return, masked or taken out of the layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from planted import Planted, injected, net, planted, pupil, section, taught
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.adapter import Step
from lorakit.errors import RecipeError
from lorakit.trainee import Trainee
from lorakit.variants.sora import ProximalGates, SoRAConfig


def config(rank: int = 8, **sparsity: Any) -> SoRAConfig:
    given = {"variant": "sora", "rank": rank, "alpha": 2.0 * rank, "sparsity": sparsity}
    return SoRAConfig.model_validate(given)


class Losses(Planted):
    """The planted task, with the loss of every step written down."""

    seen: list[float]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        if model.training:
            self.seen.append(float(loss.detach()))
        return loss


def losses(trainee: Trainee, settings: Any) -> list[float]:
    rows = planted()
    task = Losses(rows.x, rows.y)
    object.__setattr__(task, "seen", [])
    taught(trainee, settings, task)
    return task.seen


# dead gates


@pytest.mark.parametrize("revive", [True, False])
def test_a_dead_gate_comes_back_only_if_it_may(revive: bool) -> None:
    given = config(xi=1e-4, revive=revive, gate_lr=0.05)
    settings = section(steps=40, lr=1e-2)
    trainee = pupil(given, settings)
    killed = trainee.controller.after_step

    def after_step(ctx: Step) -> Any:
        if ctx.step == 10:
            trainee.layers["up"].g.data[:4] = 0.0
        return killed(ctx)

    trainee.controller.after_step = after_step
    taught(trainee, settings)
    assert (trainee.layers["up"].rank() == 8) is revive


def test_without_revival_dead_gates_have_no_part_in_the_clipped_norm() -> None:
    given = config(xi=0.1, revive=False)
    layers = injected(net(), given)
    controller = ProximalGates(layers, given, 10)
    layers["up"].g.data = torch.tensor([1.0, 0.05, -1.0, 0.0, 1, 1, 1, 1])
    controller.after_step(Step(1, 10, lambda _: 0.0))
    for layer in layers.values():
        layer.g.grad = torch.ones(8)
    controller.before_step(Step(2, 10, lambda _: 0.0))
    assert layers["up"].g.grad.tolist() == [1, 0, 1, 0, 1, 1, 1, 1]
    assert layers["down"].g.grad.tolist() == [1] * 8


# compaction


@pytest.mark.parametrize(("weight_decay", "dropout"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_compacted_or_masked_a_run_is_the_same(weight_decay: float, dropout: float) -> None:
    """Losses of 400 steps to 1e-5 of their size, while layers shrink in their middle.

    With dropout too: what is drawn is as wide as the input, whatever the rank has become.
    """
    settings = section(steps=400, lr=3e-3, clip=0.1, weight_decay=weight_decay)
    seen, ranks, rows = {}, {}, {}
    for compact in (False, True):
        torch.manual_seed(0)
        given = config(xi=6e-3, gate_init="normal", revive=False, compact=compact)
        trainee = pupil(given.model_copy(update={"dropout": dropout}), settings)
        seen[compact] = losses(trainee, settings)
        ranks[compact] = {name: layer.rank() for name, layer in trainee.layers.items()}
        rows[compact] = [len(layer.A) for layer in trainee.layers.values()]
    assert ranks[True] == ranks[False]
    assert sum(rows[True]) < sum(rows[False]) == 16
    assert_close(torch.tensor(seen[True]), torch.tensor(seen[False]), rtol=1e-5, atol=0)


def test_a_target_is_met_alike_compacted_or_masked() -> None:
    settings, ended = section(steps=100, lr=1e-2), []
    for compact in (False, True):
        torch.manual_seed(0)
        trainee = pupil(config(keep=0.25, gate_lr=0.03, compact=compact), settings)
        taught(trainee, settings)
        ended.append({name: layer.delta() for name, layer in trainee.layers.items()})
        assert sum(layer.rank() for layer in trainee.layers.values()) == 4
    assert_close(ended[1], ended[0], rtol=1e-3, atol=1e-5)


def test_a_layer_is_rebuilt_when_a_quarter_of_it_is_dead_and_not_before() -> None:
    given = config(xi=0.1, compact=True)
    layers = injected(net(), given)
    controller = ProximalGates(layers, given, 10)
    layers["up"].g.data[5] = 0.0
    layers["down"].g.data[[1, 2]] = 0.0
    kept = controller.after_step(Step(1, 10, lambda _: 0.0))
    assert {name: ranks.tolist() for name, ranks in kept.items()} == {"down": [0, 3, 4, 5, 6, 7]}


def test_moments_follow_their_ranks() -> None:
    settings = section(steps=3)
    trainee = pupil(config(xi=0.0, compact=True), settings)
    taught(trainee, settings)
    layer, kept = trainee.layers["up"], torch.tensor([1, 4, 6])
    before = {name: dict(trainee.optimizer.state[getattr(layer, name)]) for name in layer.ranked}
    optim.compact(trainee.optimizer, layer.compact(kept), kept)
    for name, axis in layer.ranked.items():
        after = trainee.optimizer.state[getattr(layer, name)]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(after[key], before[name][key].index_select(axis, kept))
        assert after["step"] == before[name]["step"]
    assert all(p.requires_grad for p in (layer.A, layer.B, layer.g))


def test_a_layer_without_ranks_is_its_base_and_trains_on() -> None:
    settings = section(steps=4)
    trainee = pupil(config(xi=0.0, compact=True), settings)
    layer = trainee.layers["up"]
    layer.g.data.zero_()
    trainee.controller.live[:8] = False
    taught(trainee, settings)
    assert (len(layer.A), layer.B.shape[1], layer.rank(), layer.r) == (0, 0, 0, 8)
    x = torch.randn(3, 16)
    assert torch.equal(layer(x), layer.base(x))
    assert layer.factors().parameters == 0


def test_moments_in_blocks_of_eight_bits_refuse() -> None:
    trainee = pupil(config(xi=0.1, compact=True), section(steps=1))
    layer = trainee.layers["up"]
    for p in (layer.A, layer.B, layer.g):
        trainee.optimizer.state[p]["state1"] = torch.zeros(p.shape, dtype=torch.uint8)
    kept = torch.tensor([0])
    with pytest.raises(RecipeError, match="8-bit moments cannot be compacted"):
        optim.compact(trainee.optimizer, layer.compact(kept), kept)


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_a_run_that_would_meet_such_moments_is_refused_before_it_starts(
    recipe: Path, lorakit: Any, optimizer: str
) -> None:
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.05, compact: true}")
    for command in (("train", recipe), ("train", "--dry-run", recipe)):
        answer = lorakit(*command, *sora, f"train.optimizer={optimizer}")
        assert answer.code == 2
        assert f"only with moments in 32 bits; train.optimizer is {optimizer}. Turn" in answer.err
        assert not Path("runs").exists()

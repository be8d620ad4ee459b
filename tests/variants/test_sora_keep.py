"""SoRA's target: the share asked for is left, in time and a few at a time, at any run's length."""

from typing import Any

import pytest
import torch
from planted import Notes, injected, net, pupil, section, taught
from torch import Tensor
from torch.testing import assert_close

from lorakit.adapter import Step
from lorakit.errors import RecipeError
from lorakit.target import Target, dying
from lorakit.trainee import Trainee
from lorakit.variants.sora import GatesToTarget, SoRAConfig, controller

RANK = 16
GATES = 2 * RANK


def config(keep: float, rank: int = RANK, **sparsity: Any) -> SoRAConfig:
    given = {"keep": keep, "gate_lr": 0.03, **sparsity}
    return SoRAConfig.model_validate(
        {"variant": "sora", "rank": rank, "alpha": 2.0 * rank, "sparsity": given}
    )


def watched(given: SoRAConfig, steps: int, lr: float = 1e-2) -> tuple[Trainee, list[int], Notes]:
    """A run, and how many gates lived after each step."""
    settings = section(steps=steps, lr=lr)
    trainee = pupil(given, settings)
    live: list[int] = []

    def after_step(ctx: Step) -> Any:
        kept = GatesToTarget.after_step(trainee.controller, ctx)
        live.append(sum(layer.rank() for layer in trainee.layers.values()))
        return kept

    trainee.controller.after_step = after_step
    return trainee, live, taught(trainee, settings)


# the law, alone


def test_the_deaths_that_come_closest_to_the_target_are_counted() -> None:
    ones = torch.ones(10)
    assert [dying(ones, left) for left in (10.0, 7.6, 7.4, 1.0)] == [0, 2, 3, 9]
    assert dying(torch.tensor([1.0, 4.0, 1.0]), left=4.9) == 1


def test_one_rank_stays_whatever_is_asked_for() -> None:
    assert dying(torch.ones(10), left=0.0) == 9


@pytest.mark.parametrize("steps", [27, 60, 200, 1000])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.7, 0.99, 1.0])
def test_with_scores_that_change_at_random_the_target_is_met_in_time(
    steps: int, keep: float
) -> None:
    """The worst case: nothing that a step decides helps the next."""
    alive, cost = torch.ones(592, dtype=torch.bool), torch.ones(592, dtype=torch.float64)
    target, most = Target.of(cost, keep, steps), 0
    assert target.first >= 1
    for step in range(1, target.last + 1):
        due = target.due(torch.rand(int(alive.sum())), cost[alive], step)
        most = max(most, int((due == 0).sum()))
        alive[alive.nonzero().flatten()[due == 0]] = False
    assert int(alive.sum()) == round(keep * 592)
    assert most <= 0.05 * 592


def test_a_quarter_of_the_run_is_dense_and_the_last_quarter_has_no_deaths() -> None:
    target = Target.of(torch.ones(592), 0.3, 200)
    assert (target.first, target.last, target.at_most) == (51, 150, 29)


def test_deaths_are_spread_evenly_and_the_least_useful_go_first() -> None:
    target = Target(left=4.0, first=1, last=6, at_most=3)
    score = torch.tensor([3.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0])
    due = target.due(score, torch.ones(7), step=1)
    assert due.tolist() == [5.0, 1.0, 3.0, *[float("inf")] * 4]
    assert target.due(score, torch.ones(7), step=6).tolist()[:3] == [0.0] * 3


def test_no_more_die_in_a_step_than_may_even_where_time_is_over() -> None:
    target = Target(left=1.0, first=1, last=5, at_most=2)
    for step in (5, 9):
        due = target.due(torch.arange(6.0), torch.ones(6), step)
        assert due.tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, float("inf")]


def test_a_dear_rank_dies_in_its_turn_and_fewer_follow_it() -> None:
    target = Target(left=2.0, first=1, last=1, at_most=9)
    score = torch.tensor([3.0, 2.0, 2.5])
    assert target.due(score, torch.tensor([1.0, 4.0, 1.0]), step=1).isfinite().tolist() == [
        False,
        True,
        False,
    ]
    assert target.due(score, torch.tensor([1.0, 1.0, 4.0]), step=1).isfinite().tolist() == [
        False,
        True,
        True,
    ]


# the run


@pytest.mark.parametrize(("keep", "steps"), [(0.7, 60), (0.1, 60), (0.3, 200), (0.1, 1000)])
def test_the_target_is_met_at_any_length_of_the_run(keep: float, steps: int) -> None:
    """To the rank, by three quarters of the steps; and behind them none dies or comes back."""
    trainee, live, _ = watched(config(keep), steps)
    assert live[-1] == round(keep * GATES)
    assert len(set(live[3 * steps // 4 - 1 :])) == 1
    assert set(live[: steps // 4]) == {GATES}
    assert max(a - b for a, b in zip([GATES, *live], live, strict=False)) <= max(1, GATES // 20)
    assert trainee.controller.settled()


@pytest.mark.parametrize("keep", [0.7, 0.4, 0.1])
def test_a_share_of_the_parameters_is_met_where_ranks_differ_in_cost(keep: float) -> None:
    given = config(keep, of="parameters")
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 48))
    layers = injected(model, given)
    push = controller(layers, given, 60)
    for layer in layers.values():
        torch.nn.init.normal_(layer.g)
    for step in range(1, 61):
        push.after_step(Step(step, 60, lambda _: 0.0))
    kept = sum(layer.factors().parameters for layer in layers.values())
    assert abs(kept - keep * 16 * (32 + 64)) <= 64 / 2


def test_the_survivors_are_not_shrunk() -> None:
    given = config(0.5, rank=4)
    layers = injected(net(), given)
    push = controller(layers, given, 20)
    layers["up"].g.data = torch.tensor([0.1, 2.0, 0.2, 3.0])
    layers["down"].g.data = torch.tensor([4.0, 0.3, 5.0, 0.4])
    for step in range(1, 21):
        push.after_step(Step(step, 20, lambda _: 0.0))
    assert_close(layers["up"].g.data, torch.tensor([0.0, 2.0, 0.0, 3.0]))
    assert_close(layers["down"].g.data, torch.tensor([4.0, 0.0, 5.0, 0.0]))


def test_a_gate_that_dies_is_led_to_zero_evenly() -> None:
    """Over a tenth of the run, where no gradient moves it."""
    given = config(0.97)  # one of 32
    layers = injected(net(), given)
    push = controller(layers, given, 100)
    layers["up"].g.data[3] = 0.5
    path = []
    for step in range(1, 101):
        push.after_step(Step(step, 100, lambda _: 0.0))
        path.append(float(layers["up"].g.data[3]))
    assert path[64:76] == pytest.approx([0.5, *(0.05 * i for i in range(9, -1, -1)), 0.0], abs=1e-6)


def test_it_tells_the_mean_threshold_which_is_0_before_and_after() -> None:
    _, _, notes = watched(config(0.3), 60)
    told = [row["xi"] for row in notes.rows if "ranks" in row]
    assert told[0] == told[-1] == 0.0
    assert any(xi > 0 for xi in told)


def test_until_the_target_is_met_no_checkpoint_is_the_best() -> None:
    settings = section(steps=60, eval_every=10)
    trainee = pupil(config(0.3), settings)
    taught(trainee, settings)
    assert trainee.progress.best_step in (50, 60)


class Upside(Target):
    """Lets the largest die first."""

    def due(self, score: Tensor, cost: Tensor, step: int) -> Tensor:
        return super().due(-score, cost, step)


def test_ranks_are_turned_a_step_later_where_that_step_was_left_out() -> None:
    settings = section(steps=60)
    trainee = pupil(config(keep=0.5), settings)
    first, shared = trainee.controller.target.first, {}

    def after_step(ctx: Step) -> Any:
        kept = GatesToTarget.after_step(trainee.controller, ctx) if ctx.step != first else {}
        angles = []
        for layer in trainee.layers.values():
            rows = torch.nn.functional.normalize(layer.A.detach())
            angles.append(float((rows @ rows.T).fill_diagonal_(0).abs().max()))
        shared[ctx.step] = max(angles)
        return kept

    trainee.controller.after_step = after_step
    taught(trainee, settings)
    assert shared[first] > 0.1
    assert shared[first + 1] < 1e-3  # principal axes


def test_large_gates_are_the_ones_to_keep() -> None:
    settings = section(steps=150, lr=1e-2)
    scores = []
    for kind in (Target, Upside):
        torch.manual_seed(0)
        trainee = pupil(config(0.2), settings)
        trainee.controller.target = kind(*trainee.controller.target)
        scores.append(taught(trainee, settings).scores()[-1])
    assert scores[0] < 0.7 * scores[1]


@pytest.mark.parametrize("keep", [0.1, 0.9])
def test_a_run_too_short_for_its_deaths_is_refused(keep: float) -> None:
    given = config(keep)
    need = GATES - round(keep * GATES) + 1  # one a step, none in the first
    short = max(steps for steps in range(1, 100) if 3 * steps // 4 < need)
    layers = injected(net(), given)
    with pytest.raises(RecipeError, match=r"^adapter.sparsity.keep: .* train longer"):
        controller(layers, given, short)
    assert controller(layers, given, short + 1).stages()[0].steps == short + 1


def test_to_keep_all_is_a_gated_lora() -> None:
    trainee, live, _ = watched(config(1.0), 40)
    assert set(live) == {GATES}
    assert trainee.controller.settled()

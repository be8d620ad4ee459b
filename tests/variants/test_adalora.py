"""What the paper says of AdaLoRA, and of no other variant; and its numbers against PEFT's."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from planted import added, injected, net, section
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.adapter import Factors, Plan, Step
from lorakit.errors import LorakitError, RecipeError
from lorakit.variants.adalora import (
    AdaLoRAConfig,
    AdaLoRALinear,
    Budget,
    RankAllocator,
    cubic,
    keep_top,
    orthogonality,
    schedule,
    smooth,
)
from lorakit.variants.lora import LoRAConfig

STEPS = 40
SHORT = {"target": 2, "warmup": 6, "final": 10, "interval": 4}
"""Allocations after steps 8, 12, …, 28 and, the last, 30."""


def config(budget: dict[str, Any] | None = None, **settings: Any) -> AdaLoRAConfig:
    given = {"variant": "adalora", "rank": 4, "alpha": 8.0, "budget": budget or SHORT, **settings}
    return AdaLoRAConfig.model_validate(given)


def at(step: int) -> Step:
    return Step(step, STEPS, lambda _: 0.0)


Run = tuple[dict[str, AdaLoRALinear], RankAllocator]


def run(
    given: AdaLoRAConfig, steps: int = STEPS, start: Mapping[str, list[Tensor]] | None = None
) -> Iterator[Run]:
    """Layers and controller after every step of AdamW on fixed rows; gradients are still there.

    `start` has A, B and E of each layer.
    """
    model = net()
    layers = injected(model, given)
    for name, tensors in (start or {}).items():
        for p, value in zip((layers[name].A, layers[name].B, layers[name].E), tensors, strict=True):
            p.data.copy_(value.view_as(p))
    controller = RankAllocator(layers, given, STEPS)
    own = [p for layer in layers.values() for p in (layer.A, layer.B, layer.E)]
    optimizer = torch.optim.AdamW(own, lr=2e-2, weight_decay=0.0)
    for step, (x, y) in zip(range(1, steps + 1), rows(), strict=False):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        penalty = controller.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        controller.before_step(at(step))
        controller.after_step(at(step))
        yield layers, controller


def rows() -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    map_ = torch.randn(16, 16, generator=draw)
    while True:
        x = torch.randn(16, 16, generator=draw)
        yield x, x @ map_


def every(layers: dict[str, AdaLoRALinear], name: str) -> Tensor:
    """A vector of all layers in a row, copied."""
    return torch.cat([getattr(layer, name).detach().clone() for layer in layers.values()])


# the layer


def test_the_update_is_s_b_e_a() -> None:
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.E)
    x = torch.randn(3, 16)
    assert_close(added(layer, x), 2.0 * ((x @ layer.A.T) * layer.E) @ layer.B.T)


def test_with_e_at_one_it_is_lora_forward_and_backward() -> None:
    ours, plain = net(), net()
    ada = injected(ours, config())["up"]
    lora = injected(plain, LoRAConfig(variant="lora", rank=4, alpha=8.0))["up"]
    with torch.no_grad():
        ada.E.fill_(1.0)
        lora.A.copy_(ada.A)
        lora.B.copy_(ada.B)
    x = torch.randn(5, 16)
    assert_close(ada(x), lora(x))
    ada(x).square().sum().backward()
    lora(x).square().sum().backward()
    assert_close(ada.A.grad, lora.A.grad)
    assert_close(ada.B.grad, lora.B.grad)


def test_it_starts_at_zero_with_small_normal_a_and_b_and_every_rank_live() -> None:
    layer = AdaLoRALinear(nn.Linear(500, 400), config(), Plan(100, 1.0))
    for X in (layer.A, layer.B):
        assert abs(float(X.detach().mean())) < 1e-3
        assert abs(float(X.detach().std()) - 0.02) < 1e-3
    assert not layer.E.any()
    assert not layer.delta().any()
    assert layer.rank() == len(layer.factors().A) == 100


def test_at_the_start_the_loss_moves_e_alone_and_the_penalty_moves_a_and_b() -> None:
    model = net()
    layers = injected(model, config())
    model(torch.randn(8, 16)).square().sum().backward()
    for layer in layers.values():
        assert layer.E.grad.all()
        assert not layer.A.grad.any()
        assert not layer.B.grad.any()
    controller = RankAllocator(layers, config(), STEPS)
    controller.penalty().backward()
    assert all(layer.A.grad.any() and layer.B.grad.any() for layer in layers.values())


def test_a_rank_is_dead_when_masked_and_still_at_zero() -> None:
    """All start at E = 0, alive. A masked E that has moved is in the update again."""
    layer = injected(net(), config())["up"]
    x = torch.randn(2, 16)
    for live, E, rank in (
        ([True] * 4, [0.0, 0, 0, 0], 4),
        ([True, False, True, False], [0.5, 0, 0, 0], 2),
        ([True, False, True, False], [0.5, -0.1, 0, 0], 3),
        ([False] * 4, [0.0, 0, 0, 0], 0),
    ):
        layer.live.copy_(torch.tensor(live))
        layer.E.data = torch.tensor(E)
        A, B = layer.factors()
        assert len(A) == layer.rank() == rank
        assert_close(x @ A.T @ B.T, added(layer, x))


def test_masking_keeps_the_scale_of_the_start() -> None:
    layer = injected(net(), config())["up"]
    layer.E.data = torch.tensor([3.0, 0, 0, 0])
    layer.live[1:] = False
    _, B = layer.factors()
    assert_close(B[:, 0], 8.0 / 4 * 3.0 * layer.B.detach()[:, 0])


def test_from_a_plain_pair_it_starts_as_the_pairs_svd() -> None:
    start = Factors(torch.randn(3, 16), torch.randn(48, 3))
    layer = AdaLoRALinear(nn.Linear(16, 48), config(), Plan(3, 2.0, start))
    assert_close(layer.delta(), start.B @ start.A, rtol=1e-4, atol=1e-5)
    assert_close(layer.A @ layer.A.T, torch.eye(3))
    assert_close(layer.B.T @ layer.B, torch.eye(3))
    assert_close(orthogonality([layer.A, layer.B.T]), torch.tensor(0.0), atol=1e-5, rtol=0)


def test_e_has_no_weight_decay() -> None:
    model = net()
    layer = injected(model, config())["up"]
    optimizer = optim.adamw(model, {"up": layer}, section(weight_decay=0.1))
    of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (of[id(layer.E)], of[id(layer.A)], of[id(layer.B)]) == (0.0, 0.1, 0.1)


# the penalty


def test_the_penalty_is_the_mean_of_plain_norms_over_all_matrices() -> None:
    matrices = [torch.randn(r, d) for r, d in ((4, 16), (4, 48), (4, 16), (2, 16))]
    by_hand = [torch.linalg.matrix_norm(X @ X.T - torch.eye(len(X))) for X in matrices]
    assert_close(orthogonality(matrices), torch.stack(by_hand).mean())


def test_the_gradient_of_a_norm_is_its_closed_form() -> None:
    """d |A A^T - I| / dA = 2 (A A^T - I) A / |A A^T - I|."""
    A = torch.randn(4, 16, requires_grad=True)
    orthogonality([A]).backward()
    off = (A @ A.T - torch.eye(4)).detach()
    assert_close(A.grad, 2 * off @ A.detach() / off.norm())


def test_at_orthonormal_matrices_the_penalty_and_its_gradient_are_zero() -> None:
    X = torch.eye(4, 16, requires_grad=True)
    Y = torch.eye(4, 16, requires_grad=True)
    loss = orthogonality([X, Y])
    loss.backward()
    assert loss == 0
    assert not X.grad.any()
    assert not Y.grad.any()


def test_the_penalty_takes_rows_of_a_and_columns_of_b_and_its_weight() -> None:
    layers = injected(net(), config())
    for weight in (0.1, 0.4):
        controller = RankAllocator(layers, config(orthogonality=weight), STEPS)
        matrices = [X for layer in layers.values() for X in (layer.A, layer.B.T)]
        assert_close(controller.penalty(), weight * orthogonality(matrices))
    assert RankAllocator(layers, config(orthogonality=0), STEPS).penalty() is None


def test_the_penalty_makes_bases_orthonormal() -> None:
    off = []
    for weight in (0.0, 1.0):
        *_, (layers, _) = run(config(orthogonality=weight))
        off.append(float(orthogonality([layer.A.detach() for layer in layers.values()])))
    assert off[1] < 0.5 * off[0]


# the schedule


def test_the_budget_falls_as_a_cube_from_the_start_to_the_end() -> None:
    assert [cubic(100, 20, done) for done in (0.0, 0.5, 1.0)] == [100, 30, 20]
    falling = [cubic(592, 197, step / 1000) for step in range(1001)]
    assert falling == sorted(falling, reverse=True)


def test_the_budget_is_the_start_at_t_i_and_the_end_at_t_minus_t_f() -> None:
    """RTE's steps with 72 matrices. Eq. 14 as printed has 455 and 134 there."""
    given = Budget(target=1, warmup=600, final=1800, interval=1)
    plan = schedule(given, start=108, linears=72, steps=3900)
    ends = (600, 2100)
    assert [plan.budget(t) for t in ends] == [108, 72]
    printed = [72 + 36 * (1 - (t - 600 - 1800) / (3900 - 600 - 1800)) ** 3 for t in ends]
    assert [int(b) for b in printed] == [455, 134]


def test_the_budget_holds_before_and_behind_the_middle_phase() -> None:
    plan = schedule(Budget.model_validate(SHORT), start=8, linears=2, steps=STEPS)
    assert [plan.budget(t) for t in (0, 1, 6)] == [8] * 3
    assert [plan.budget(t) for t in (30, 31, 40)] == [4] * 3
    assert [t for t in range(1, STEPS + 1) if plan.due(t)] == [8, 12, 16, 20, 24, 28, 30]


def test_shares_of_the_run_are_steps() -> None:
    shares = Budget(target=2, warmup=0.15, final=0.25, interval=0.1)
    steps = Budget(target=2, warmup=6, final=10, interval=4)
    assert schedule(shares, 8, 2, STEPS) == schedule(steps, 8, 2, STEPS)


def test_by_default_two_thirds_of_the_start_ranks_stay_whatever_the_length_of_the_run() -> None:
    for steps in range(1, 400):
        plan = schedule(Budget(), start=36, linears=3, steps=steps)
        assert plan.end == 24
        assert sum(plan.due(t) for t in range(1, steps + 1)) >= 1


def test_budgets_count_the_start_ranks_that_linears_really_have() -> None:
    layers = injected(net(), config(), ranks={"up": 2, "down": 7})
    plan = RankAllocator(layers, config(), STEPS).schedule
    assert (plan.start, plan.end) == (9, 4)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"warmup": 30}, r"adapter\.budget: 30 steps of warmup and 10 of final .* run's 40 "),
        ({"warmup": 0.8}, "32 steps of warmup and 10 of final"),
        ({"final": 40}, "6 steps of warmup and 40 of final"),
        ({"interval": 25}, r"adapter\.budget\.interval: 25 steps; expected at most 24"),
        ({"target": 4}, r"adapter\.budget\.target: 8 ranks over 2 linears; .* fewer than the 8 "),
        ({"target": 5}, "10 ranks over 2 linears"),
        ({"target": 0.2}, "0 ranks over 2 linears; expected at least 1"),
    ],
)
def test_a_budget_that_cannot_bite_is_refused_with_its_numbers(
    given: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says):
        schedule(Budget.model_validate({**SHORT, **given}), start=8, linears=2, steps=STEPS)


def test_all_that_does_not_fit_the_run_is_told_together() -> None:
    layers, given = injected(net(), config()), config({**SHORT, "target": 3.9, "interval": 25})
    with pytest.raises(RecipeError) as refusal:
        RankAllocator(layers, given, STEPS)
    assert str(refusal.value).count("adapter.budget.") == 2


def test_the_longest_interval_that_is_accepted_has_an_allocation_in_the_middle() -> None:
    for warmup in range(10):
        given = Budget(target=2, warmup=warmup, final=10, interval=30 - warmup)
        plan = schedule(given, 8, 2, STEPS)
        assert any(plan.due(t) for t in range(warmup + 1, 31))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"budget": {"target": 4}}, r"budget.target\n .* expected less than the start rank, 4"),
        ({"budget": {"target": 0}}, "greater than 0"),
        ({"budget": {"warmup": 0.5, "final": 0.5}}, "leave nothing between"),
        ({"budget": {"warmup": 0.6}}, r"warmup \(0.6\) and final \(0.5\)"),
        ({"budget": {"warmup": 1.5}}, "less than 1"),
        ({"budget": {"final": -1}}, "greater than"),
        ({"budget": {"interval": 0}}, "greater than 0"),
        ({"budget": {"beta1": 1.0}}, "less than 1"),
        ({"budget": {"beta2": 0.0}}, "greater than 0"),
        ({"orthogonality": -0.1}, "greater than or equal to 0"),
    ],
)
def test_settings_out_of_range_or_at_odds_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        config(**{"budget": {}, **given})


def test_where_linears_have_ranks_of_their_own_the_run_judges_the_target() -> None:
    assert config({"target": 5}, ranks={"up": 8}).budget.target == 5
    assert config({"target": 5}, ranks_from="runs/other").budget.target == 5


# scores


def test_the_first_score_of_a_number_has_a_closed_form() -> None:
    """From moments at 0: I~ = (1 - b1) I, U~ = (1 - b2) b1 I."""
    sensitivity, uncertainty, now = torch.zeros(5), torch.zeros(5), torch.rand(5)
    smooth(sensitivity, uncertainty, now, 0.8, 0.7)
    assert_close(sensitivity, 0.2 * now)
    assert_close(uncertainty, 0.3 * 0.8 * now)


def test_a_steady_sensitivity_is_found_and_its_uncertainty_fades() -> None:
    sensitivity, uncertainty = torch.zeros(1), torch.zeros(1)
    for _ in range(300):
        smooth(sensitivity, uncertainty, torch.tensor([2.0]), 0.85, 0.85)
    assert_close(sensitivity, torch.tensor([2.0]))
    assert uncertainty < 1e-5


def test_a_score_is_that_of_e_and_the_means_of_a_row_and_a_column() -> None:
    *_, (layers, controller) = run(config(), steps=3)
    s = (controller.sensitivity * controller.uncertainty).split([64, 192, 4, 192, 64, 4])
    want = []
    for (A, B, E), layer in zip((s[:3], s[3:]), layers.values(), strict=True):
        A, B = A.view_as(layer.A), B.view_as(layer.B)
        want += [E[k] + A[k].mean() + B[:, k].mean() for k in range(4)]
    assert_close(controller.scores(), torch.stack(want), rtol=1e-4, atol=0)
    assert (controller.scores() > 0).all()


def test_scores_take_the_weights_after_the_step_and_the_gradients_that_moved_them() -> None:
    layers, controller = next(iter(run(config(), steps=1)))
    layer = layers["up"]
    count = layer.A.numel()
    now = (layer.A * layer.A.grad).abs().detach().flatten()
    assert layer.A.grad.any()  # the penalty's: the loss gives A none at E = 0
    assert_close(controller.sensitivity[:count], 0.15 * now, rtol=1e-4, atol=0)


def test_a_linear_that_no_gradient_reaches_has_no_importance() -> None:
    layers = injected(net(), config(orthogonality=0))
    controller = RankAllocator(layers, config(orthogonality=0), STEPS)
    layers["up"].E.data.fill_(1.0)
    layers["up"](torch.randn(4, 16)).square().sum().backward()
    controller.after_step(at(1))
    assert controller.scores()[:4].all()
    assert not controller.scores()[4:].any()


def test_exactly_so_many_are_kept_the_highest_and_of_equals_the_first() -> None:
    scores = torch.tensor([1.0, 3, 1, 2, 1, 3])
    kept = [keep_top(scores, count).nonzero().flatten().tolist() for count in range(7)]
    assert kept == [[], [1], [1, 5], [1, 3, 5], [0, 1, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]


def test_all_scores_equal_still_keeps_the_budget() -> None:
    """The authors' threshold, by `<=`, would mask every rank."""
    assert int(keep_top(torch.zeros(100), 37).sum()) == 37


# the run


def test_after_every_allocation_as_many_ranks_are_live_as_the_budget_says() -> None:
    seen = []
    for step, (layers, controller) in enumerate(run(config()), start=1):
        if controller.schedule.due(step):
            live = sum(layer.rank() for layer in layers.values())
            assert live == every(layers, "live").sum() == controller.schedule.budget(step)
            assert live == every(layers, "E").count_nonzero()
            assert controller.told() == {"budget": live}
            seen.append(live)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] < 8
    assert seen[-1] == 4


def test_nothing_is_masked_in_the_warm_up() -> None:
    for layers, _ in run(config(), steps=7):
        assert every(layers, "live").all()
        assert every(layers, "E").all()


def test_between_allocations_a_masked_rank_comes_back_and_its_vectors_stay() -> None:
    for step, (layers, _) in enumerate(run(config(), steps=9), start=1):
        live = every(layers, "live")
        if step == 8:
            assert not every(layers, "E")[~live].any()
            assert all(layer.A.all() and layer.B.all() for layer in layers.values())
        if step == 9:
            assert every(layers, "E").all()
            assert sum(layer.rank() for layer in layers.values()) == 8


def test_in_the_final_phase_masks_scores_and_dead_ranks_rest() -> None:
    """The step of the last allocation, 30, judges by the scores of the step before it."""
    live, scores = torch.empty(0), torch.empty(0)
    for step, (layers, controller) in enumerate(run(config()), start=1):
        assert controller.settled() == (step >= 30)
        if step == 29:
            scores = controller.scores()
        if step == 30:
            live = every(layers, "live")
        if step >= 30:
            assert torch.equal(every(layers, "live"), live)
            assert torch.equal(every(layers, "E") != 0, live)
            assert torch.equal(controller.scores(), scores)


def test_a_restored_one_knows_its_phase_where_the_first_step_is_left_out() -> None:
    *_, (layers, controller) = run(config(), steps=31)
    restored = RankAllocator(layers, config(), STEPS)
    restored.load_state_dict(controller.state_dict())
    for each in (controller, restored):
        each.before_step(at(32))  # and no step is taken
    assert restored.settled()
    assert restored.told() == controller.told() == {"budget": 4}


def test_a_rank_that_does_nothing_goes_first() -> None:
    """Columns of B held at 0 give E no gradient: of importance only A's is left, near 0."""
    given = config(orthogonality=0)
    idle = [0, 2]
    for step, (layers, _) in enumerate(run(given), start=1):
        if step < 30:
            for layer in layers.values():
                layer.B.data[:, idle] = 0.0
    assert all(layer.live.tolist() == [False, True, False, True] for layer in layers.values())


def test_a_run_whose_ranks_never_moved_fails_loudly() -> None:
    *_, (_, stopped) = run(config(), steps=29)
    for controller in (RankAllocator(injected(net(), config()), config(), STEPS), stopped):
        with pytest.raises(LorakitError, match=r"8 of 8 ranks .* asks for 4: .* after step 30"):
            controller.ended()
    *_, (_, finished) = run(config())
    assert finished.ended() == ()


def test_moments_and_masks_come_back_from_what_is_saved() -> None:
    *_, (layers, controller) = run(config(), steps=20)
    other = RankAllocator(injected(net(), config()), config(), STEPS)
    other.load_state_dict(controller.state_dict())
    assert torch.equal(other.scores(), controller.scores())
    assert all("live" in layer.own_state() for layer in layers.values())


# against PEFT


class Lossy(nn.Module):
    """PEFT adds its penalty to an output's `loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.net(x) - y).square().mean())


def theirs(given: AdaLoRAConfig, budget: dict[str, Any]) -> Any:
    """PEFT's model of the same settings. It divides alpha by r + 1e-5, which is undone here."""
    return peft.get_peft_model(
        Lossy(),
        peft.AdaLoraConfig(
            target_modules=["up", "down"],
            init_r=given.rank,
            target_r=budget["target"],
            tinit=budget["warmup"],
            tfinal=budget["final"],
            deltaT=budget["interval"],
            total_step=STEPS,
            orth_reg_weight=given.orthogonality,
            lora_alpha=given.alpha * (given.rank + 1e-5) / given.rank,
        ),
    )


def moments(model: Any, which: str) -> Tensor:
    """PEFT's I~ or U~ of all numbers, in our order."""
    kept = getattr(model.base_model.rankallocator, which)
    ends = [f"{name}.lora_{X}.default" for name in ("up", "down") for X in "ABE"]
    return torch.cat([kept[name].flatten() for end in ends for name in kept if name.endswith(end)])


@pytest.mark.parametrize("budget", [SHORT, {**SHORT, "interval": 1}, {**SHORT, "target": 1}])
def test_step_by_step_weights_moments_and_masks_are_those_of_peft(budget: dict[str, Any]) -> None:
    """PEFT forgets its moments at T - t_f, so they are compared up to there."""
    given = config(budget, orthogonality=0.5)
    model = theirs(given, budget)
    modules = {name: model.base_model.model.net.get_submodule(name) for name in ("up", "down")}

    def weights(name: str) -> list[Tensor]:
        parts = (modules[name].lora_A, modules[name].lora_B, modules[name].lora_E)
        return [part.default.detach().clone() for part in parts]

    start = {name: weights(name) for name in modules}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0
    )
    masked = set()
    ours = run(given, start=start)
    for step, (x, y), (layers, controller) in zip(range(1, STEPS + 1), rows(), ours, strict=False):
        optimizer.zero_grad()
        model.base_model(x, y).loss.backward()  # not `model`, which leaves the penalty out
        optimizer.step()
        model.base_model.update_and_allocate(step)
        for name, layer in layers.items():
            A, B, E = weights(name)
            assert torch.equal(layer.E == 0, E.flatten() == 0)
            assert_close((layer.A.data, layer.B.data, layer.E.data), (A, B, E.flatten()))
        if step < controller.schedule.last:
            assert_close(controller.sensitivity, moments(model, "exp_avg_ipt"), rtol=1e-3, atol=0)
            assert_close(controller.uncertainty, moments(model, "exp_avg_unc"), rtol=1e-3, atol=0)
        masked.add(int((every(layers, "E") == 0).sum()))
    pattern = model.peft_config["default"].rank_pattern
    assert sorted(pattern.values()) == sorted(layer.live.tolist() for layer in layers.values())
    assert step == STEPS
    assert len(masked) > 3

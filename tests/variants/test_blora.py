"""What B-LoRA is, and no other variant."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from planted import added, injected, net, planted, pupil, section, taught
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import optim, quantizer
from lorakit.adapter import Plan, Step
from lorakit.codes import BITS, FLOAT
from lorakit.errors import NotLowRankError, RecipeError
from lorakit.variants.blora import BayesianGates, BLoRAConfig, BLoRALinear, Gates, Phase
from lorakit.variants.lora import LoRAConfig

OPEN, SHUT = 9.0, -9.0


def config(quantize: dict[str, bool] | None = None, rank: int = 4, **gates: Any) -> BLoRAConfig:
    given = {"variant": "blora", "rank": rank, "alpha": 2.0 * rank}
    return BLoRAConfig.model_validate({**given, "gates": gates, "quantize": quantize or {}})


def layer_of(given: BLoRAConfig | None = None, base: nn.Module | None = None) -> BLoRALinear:
    """A layer in the gates' phase with all gates open and nothing at a start value."""
    given = given or config()
    layer = BLoRALinear(base or nn.Linear(16, 12), given, Plan(given.rank, given.scale))
    with torch.no_grad():
        layer.B.normal_()
        layer.E.uniform_(0.6, 1.4)
        layer.bit_logits.fill_(OPEN)
        layer.rank_logits.fill_(OPEN)
    if given.quantize.activations:
        layer(torch.randn(8, 16))
    layer.calibrate()
    return layer


@torch.no_grad()
def narrow(layer: BLoRALinear, **bits: int) -> BLoRALinear:
    """Thresholded gates, and codes of those widths: `narrow(layer, A=4)`."""
    for name, width in bits.items():
        open_ = torch.tensor([b <= width for b in BITS[1:]])
        layer.bit_logits[layer.quantised.index(name)] = torch.where(open_, OPEN, SHUT)
    layer.phase.fill_(Phase.FROZEN)
    return layer


def at(step: int, steps: int = 100) -> Step:
    return Step(step, steps, lambda _: 0.1)


# the limits in which it is another method


@pytest.mark.parametrize("phase", [Phase.DENSE, Phase.FROZEN])
def test_unquantised_with_e_at_1_it_is_lora_gradients_included(phase: Phase) -> None:
    blora = injected(net(), config(gate_init=OPEN))["up"]
    lora = injected(net(), LoRAConfig(variant="lora", rank=4, alpha=8.0))["up"]
    nn.init.normal_(blora.B)
    blora.phase.fill_(phase)
    with torch.no_grad():
        lora.A.copy_(blora.A)
        lora.B.copy_(blora.B)
    x = torch.randn(5, 16)
    assert_close(blora(x), lora(x))
    blora(x).square().sum().backward()
    lora(x).square().sum().backward()
    assert_close(blora.A.grad, lora.A.grad)
    assert_close(blora.B.grad, lora.B.grad)


def test_with_open_gates_it_is_b_diag_e_a() -> None:
    layer, x = layer_of(), torch.randn(3, 16)
    want = layer.scale * ((x @ layer.A.T) * layer.E) @ layer.B.T
    for training in (False, True):
        layer.train(training).phase.fill_(Phase.FROZEN)
        assert_close(added(layer, x), want, rtol=1e-5, atol=1e-5)


# evaluation is the thresholded model, training its noisy relaxation


def test_evaluation_is_deterministic_and_training_follows_the_seed() -> None:
    layer, x = layer_of(config(gate_init=0.5)), torch.randn(3, 16)
    with torch.no_grad():
        layer.bit_logits.fill_(0.5)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(layer(x))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("bits", [{"A": 2, "E": 2, "B": 2}, {"A": 4, "E": 8, "B": 16}, {"A": 32}])
def test_with_frozen_gates_training_computes_what_evaluation_does(bits: dict[str, int]) -> None:
    layer, x = narrow(layer_of(), **bits), torch.randn(6, 16)
    with torch.no_grad():
        layer.rank_logits[1:] = SHUT
    assert_close(layer.train()(x), layer.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_plain_pair_answers_bit_for_bit_as_evaluation_does() -> None:
    layer, x = narrow(layer_of(), A=4, E=8, B=2).eval(), torch.randn(6, 16)
    A, B = layer.factors()
    assert torch.equal(nn.functional.linear(nn.functional.linear(x, A), B), added(layer, x))


def test_codes_stay_within_their_widths_after_the_weights_have_grown() -> None:
    layer = narrow(layer_of(), A=2, E=4, B=8)
    with torch.no_grad():
        for p in (layer.A, layer.E, layer.B):
            p.mul_(5)
    pair = layer.coded()
    for part, bits in zip((pair.A, pair.E, pair.B), (2, 4, 8), strict=True):
        assert part.bits == bits
        assert part.codes.abs().max() == 2 ** (bits - 1) - 1


def test_bits_say_how_wide_each_tensor_is() -> None:
    assert narrow(layer_of(), A=2, E=16, B=4).bits() == {"A": 2, "E": 16, "B": 4}


def test_a_rank_whose_e_rounds_to_zero_is_dead_and_its_going_changes_nothing() -> None:
    layer, x = narrow(layer_of(), E=2).eval(), torch.randn(3, 16)
    with torch.no_grad():
        layer.E.copy_(torch.tensor([1.4, 0.2, -1.4, 0.1]))
    layer.calibrate()
    A, B = layer.factors()
    assert len(A) == layer.rank() == 2
    assert_close(x @ A.T @ B.T, added(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_works_on_gpt2s_transposed_linear_in_the_precision_of_the_base(
    dtype: torch.dtype,
) -> None:
    from transformers.pytorch_utils import Conv1D

    outer = {"weights": True, "activations": True}
    for given in (config(), config(outer)):
        layer = layer_of(given, Conv1D(12, 16)).to(torch.float32)
        layer.base.to(dtype)
        x = torch.randn(3, 16).to(dtype)
        for training in (True, False):
            assert layer.train(training)(x).dtype == dtype
        layer.train()(x).float().sum().backward()
        assert layer.A.grad.dtype == torch.float32


# rank gates


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_gate_takes_all_later_ranks_with_it(closed: int) -> None:
    layer = narrow(layer_of())
    with torch.no_grad():
        layer.rank_logits[closed] = SHUT
    assert layer.rank() == closed + 1
    assert layer.open_ranks().tolist() == [1.0] * (closed + 1) + [0.0] * (3 - closed)


def test_the_first_rank_is_never_gated_and_a_layer_of_rank_1_has_no_gate() -> None:
    layer = narrow(layer_of())
    with torch.no_grad():
        layer.rank_logits.fill_(SHUT)
    assert layer.rank() == 1
    alone = layer_of(config(rank=1))
    assert alone.rank_logits.shape == (0,)
    assert alone.rank() == 1


def test_drawn_masks_are_ones_and_then_zeros() -> None:
    layer, seen = layer_of(), set()
    with torch.no_grad():
        layer.rank_logits.fill_(0.5)
    for _ in range(100):
        mask = layer._mask()
        assert mask[0] == 1
        assert set(mask.tolist()) <= {0.0, 1.0}
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        seen.add(tuple(mask.tolist()))
    assert len(seen) == 4


def test_the_mask_has_the_gradient_of_the_product_it_rounds() -> None:
    layer = layer_of()
    with torch.no_grad():
        layer.rank_logits.copy_(torch.tensor([0.3, -0.2, 0.6]))
    weight = torch.randn(4)

    def gradient(rounded: bool) -> Tensor:
        torch.manual_seed(3)
        layer.rank_logits.grad = None
        gates = quantizer.sample(layer.rank_logits)
        torch.manual_seed(3)
        product = torch.cat([torch.ones(1), gates.cumprod(0)])
        ((layer._mask() if rounded else product) * weight).sum().backward()
        assert layer.rank_logits.grad is not None
        return layer.rank_logits.grad

    assert_close(gradient(rounded=True), gradient(rounded=False))


# phases


def test_before_the_warm_up_ends_nothing_is_quantised_and_no_gate_or_range_moves() -> None:
    settings = section(steps=10)
    trainee = pupil(config(warmup=0.9, freeze=0.0), settings)
    start = {n: p.detach().clone() for n, p in trainee.layers["up"].named_parameters()}
    taught(trainee, section(steps=8), planted())
    layer = trainee.layers["up"]
    for name in ("bit_logits", "rank_logits", "log_ranges"):
        assert torch.equal(getattr(layer, name), start[name])
    assert layer.phase == Phase.DENSE
    assert not torch.equal(layer.B, start["B"])
    assert layer.coded().A.bits == FLOAT
    assert torch.equal(layer.coded().A.dense(), layer.A)


def test_the_warm_up_is_at_least_one_step_so_that_b_is_not_zero_when_its_range_is_set() -> None:
    trainee = pupil(config(warmup=0.0, freeze=0.0), section(steps=10))
    layer = trainee.layers["up"]
    taught(trainee, section(steps=1))
    assert layer.phase == Phase.GATED
    assert_close(
        layer.log_ranges.exp(), torch.stack([t.abs().max() for t in (layer.A, layer.E, layer.B)])
    )
    assert layer.log_ranges[2] > -10


def test_the_penalty_is_there_in_the_gates_phase_alone_and_is_the_sum_by_hand() -> None:
    given = config(lambda_bits=0.3, lambda_ranks=0.7, warmup=0.2, freeze=0.3)
    layers = injected(net(), given, ranks={"up": 1, "down": 4})
    controller = BayesianGates(layers, given, steps=10)
    for layer in layers.values():
        nn.init.normal_(layer.bit_logits)
        nn.init.normal_(layer.rank_logits)
    assert controller.penalty() is None
    controller.after_step(at(1, 10))
    assert controller.penalty() is None
    controller.after_step(at(2, 10))
    bits = sum(
        float(quantizer.on(row[: b + 1].detach()).prod())
        for layer in layers.values()
        for row in layer.bit_logits
        for b in range(4)
    )
    gates = quantizer.on(layers["down"].rank_logits.detach())
    ranks = sum(float(gates[: i + 1].prod()) for i in range(3)) / 3
    got = controller.penalty()
    assert got is not None
    assert float(got.detach()) == pytest.approx(0.3 * bits + 0.7 * ranks, rel=1e-5)
    controller.after_step(at(7, 10))
    assert controller.penalty() is None
    assert all(layer.phase == Phase.FROZEN for layer in layers.values())


def test_frozen_gates_do_not_move_while_codes_and_ranges_do() -> None:
    settings = section(steps=20)
    trainee = pupil(config(warmup=0.1, freeze=0.5), settings)
    layer = trainee.layers["up"]
    after, kept = trainee.controller.after_step, []

    def watched(ctx: Step) -> Any:
        got = after(ctx)
        names = ("bit_logits", "rank_logits", "log_ranges", "A")
        kept.append({name: getattr(layer, name).detach().clone() for name in names})
        return got

    trainee.controller.after_step = watched  # type: ignore[method-assign]
    taught(trainee, settings)
    for name, moves in {"bit_logits": 0, "rank_logits": 0, "log_ranges": 1, "A": 1}.items():
        assert torch.equal(kept[9][name], kept[19][name]) != moves
        assert not torch.equal(kept[5][name], kept[9][name])


def test_what_stands_still_is_no_step_for_adam() -> None:
    """A gradient of 0 would count, and make the first true steps several times too large."""
    settings = section(steps=10)
    trainee = pupil(config(warmup=0.5, freeze=0.0), settings)
    taught(trainee, settings)
    layer, state = trainee.layers["up"], trainee.optimizer.state
    assert state[layer.A]["step"] == 10
    for p in (layer.bit_logits, layer.rank_logits, layer.log_ranges):
        assert state[p]["step"] == 5


@pytest.mark.parametrize("phase", Phase)
def test_every_parameter_has_a_gradient_in_every_phase(phase: Phase) -> None:
    """Data-parallel training waits for all of them."""
    layer = layer_of(config({"weights": True, "activations": True}))
    layer.phase.fill_(phase)
    layer(torch.randn(5, 16)).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_gates_and_ranges_have_their_own_rates_and_no_weight_decay() -> None:
    model = net()
    layers = injected(model, config(gate_lr=0.2, range_lr=0.03))
    optimizer = optim.adamw(model, layers, section(lr=1e-3, weight_decay=0.1))
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    layer = layers["up"]
    for p, rate in {layer.bit_logits: 0.2, layer.rank_logits: 0.2, layer.log_ranges: 0.03}.items():
        assert (of[id(p)]["peak"], of[id(p)]["weight_decay"]) == (rate, 0.0)
    assert of[id(layer.A)]["weight_decay"] == 0.1
    assert of[id(layer.E)]["weight_decay"] == 0.0


# how far a run takes them


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("steps", [50, 200])
def test_by_default_a_gate_that_nothing_holds_closes_early_whatever_the_runs_length(
    steps: int, schedule: str
) -> None:
    """However weak the penalty is: Adam divides by its size."""
    model, given = net(), config(lambda_bits=1e-3, lambda_ranks=0.0)
    layers, settings = injected(model, given), section(schedule=schedule)
    controller, closed = BayesianGates(layers, given, steps), 0
    optimizer = optim.adamw(model, layers, settings)
    for step in range(1, steps + 1):
        optim.set_rates(optimizer, optim.factor(step, steps, settings))
        if (penalty := controller.penalty()) is not None:
            penalty.backward()
        optimizer.step()
        controller.after_step(at(step, steps))
        optimizer.zero_grad()
        closed += bool(quantizer.is_open(layers["up"].bit_logits).any())
    assert 0.15 < (closed - controller.dense) / (controller.gated - controller.dense) < 0.6


def test_a_rate_at_which_no_gate_can_close_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.gates\.gate_lr: 0\.001: no gate can close"):
        BayesianGates(injected(net(), config(gate_lr=1e-3)), config(gate_lr=1e-3), steps=100)


@pytest.mark.parametrize(("steps", "gates"), [(1, {}), (10, {"warmup": 0.98, "freeze": 0.0})])
def test_a_run_that_leaves_no_step_to_the_gates_is_refused(
    steps: int, gates: dict[str, float]
) -> None:
    given = config(**gates)
    with pytest.raises(RecipeError, match=rf"warmup is {steps} of the run's {steps} steps"):
        BayesianGates(injected(net(), given), given, steps)


def test_more_lambda_leaves_fewer_bits_and_ranks() -> None:
    settings = section(steps=50)
    bits, ranks = [], []
    for strength in (0.0, 3e-3, 1.0):
        trainee = pupil(config(lambda_bits=strength, lambda_ranks=strength), settings)
        taught(trainee, settings)
        layers = trainee.layers.values()
        bits.append(sum(sum(layer.bits().values()) for layer in layers))
        ranks.append(sum(layer.rank() for layer in layers))
    assert bits == sorted(bits, reverse=True)
    assert ranks == sorted(ranks, reverse=True)
    assert bits[0] > bits[-1] == 2 * 6
    assert ranks[0] > ranks[-1] == 2


def test_the_log_counts_widths_and_ranks() -> None:
    given = config()
    layers = injected(net(), given)
    controller = BayesianGates(layers, given, steps=100)
    for layer in layers.values():
        nn.init.normal_(layer.B)
        layer.calibrate()
        narrow(layer, A=2, E=8, B=8)
    with torch.no_grad():
        layers["up"].rank_logits[0] = SHUT
    assert controller.told() == {"bits": {"2": 2, "8": 4}, "linears_of_rank": {"1": 1, "4": 1}}


@pytest.mark.parametrize(
    ("bits", "ranks", "says"),
    [
        (2, OPEN, ["every bit gate closed", "no rank gate closed"]),
        (32, SHUT, ["no bit gate closed", "every rank gate closed"]),
        (8, 0.0, ["no rank gate closed"]),
    ],
)
def test_a_run_in_which_all_or_no_gates_closed_says_which_knob_to_turn(
    bits: int, ranks: float, says: list[str]
) -> None:
    given = config()
    layers = injected(net(), given)
    controller = BayesianGates(layers, given, steps=100)
    for layer in layers.values():
        nn.init.normal_(layer.B)
        layer.calibrate()
        narrow(layer, A=bits, E=bits, B=bits)
        nn.init.constant_(layer.rank_logits, ranks)
    said = controller.ended()
    assert len(said) == len(says)
    for text, want in zip(said, says, strict=True):
        assert want in text
        assert "adapter.gates.lambda_" in text


def test_gates_that_nothing_pushes_need_no_warning() -> None:
    given = config(lambda_bits=0.0, lambda_ranks=0.0)
    assert BayesianGates(injected(net(), given), given, steps=100).ended() == ()


def test_ranks_are_settled_once_gates_have_closed_and_rested_or_stand() -> None:
    given = config(warmup=0.1, freeze=0.5)
    layers = injected(net(), given)
    controller, seen = BayesianGates(layers, given, steps=100), []
    for step in range(1, 61):
        if step == 20:
            nn.init.constant_(layers["up"].bit_logits, SHUT)
        if step == 45:
            nn.init.constant_(layers["down"].rank_logits, SHUT)
        controller.after_step(at(step))
        seen.append(controller.settled())
    quiet = [step for step, settled in enumerate(seen, start=1) if settled]
    assert quiet == [*range(30, 45), *range(50, 61)]


# base weight and activations


@pytest.mark.parametrize("which", ["weights", "activations"])
def test_with_the_base_or_activations_quantised_there_is_no_plain_pair(which: str) -> None:
    layer = layer_of(config({which: True})).eval()
    with pytest.raises(NotLowRankError, match="quantised"):
        layer.factors()
    A, E, B = layer.A, layer.E, layer.B
    assert_close(layer.delta(), layer.scale * B @ (E[:, None] * A), rtol=1e-4, atol=1e-5)


def test_the_base_weight_is_rounded_to_its_own_width_and_never_written_to() -> None:
    layer = narrow(layer_of(config({"weights": True})), weight=4)
    before = layer.base.weight.clone()
    with torch.no_grad():
        layer.B.zero_()
    x, step = torch.randn(3, 16), 2 * before.abs().max() / 15
    rounded = step * (before / step).round().clamp(-7, 7)
    for training in (True, False):
        y = layer.train(training)(x)
        assert_close(y, nn.functional.linear(x, rounded, layer.base.bias), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.base.weight, before)


def test_activations_are_rounded_to_their_widths_on_the_ranges_of_the_warm_up() -> None:
    layer = layer_of(config({"activations": True}))
    narrow(layer, total=2).eval()
    y = layer(torch.randn(50, 16))
    assert len(y.unique()) == 3
    narrow(layer, total=32, base=2)
    assert len(layer.eval().base_output(torch.randn(50, 16)).unique()) == 3
    narrow(layer, base=32, up=2)
    assert len(added(layer.eval(), torch.randn(50, 16)).unique()) == 3


def test_outer_quantisers_answer_alike_in_frozen_training_and_evaluation() -> None:
    outer = {"weights": True, "activations": True}
    layer, x = layer_of(config(outer)), torch.randn(6, 16)
    narrow(layer, A=4, E=4, B=4, weight=4, base=8, down=8, inner=8, up=8, total=8)
    assert_close(
        layer.train()(x), layer.eval()(x), rtol=0, atol=2 * float(layer._outer().total.step)
    )


def test_a_base_weight_in_codes_has_nothing_to_quantise() -> None:
    base = nn.Linear(16, 12).requires_grad_(False)
    base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(RecipeError, match=r"adapter\.quantize\.weights: .* in codes already"):
        BLoRALinear(base, config({"weights": True}), Plan(4, 2.0))


def test_a_run_with_everything_quantised_is_scored_again_as_it_was(
    recipe: Path, lorakit: Any
) -> None:
    """Bits, ranks, ranges and phase are in the checkpoint, or the scores would differ."""
    given = yaml.safe_load(recipe.read_text())
    quantize = {"weights": True, "activations": True}
    given["adapter"] = {"variant": "blora", "rank": 4, "quantize": quantize}
    given["train"] |= {"steps": 12, "save_every": 6, "eval_every": 12, "log_every": 1, "lr": 1e-2}
    recipe.write_text(yaml.safe_dump(given))
    assert lorakit("train", recipe).code == 0
    rows = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["bits"] == {"32": 9 * len(rows[0]["ranks"])}
    assert rows[-2]["bits"] != rows[0]["bits"]
    answer = lorakit("eval", "runs/tiny", "--json")
    assert answer.code == 0, answer.err
    scores = json.loads(answer.out)["scores"]
    assert scores == pytest.approx({name: rows[-1][name] for name in scores}, abs=1e-6)
    refused = lorakit("prune", "runs/tiny")
    assert refused.code == 2
    assert "quantised too" in refused.err


# settings


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"warmup": 0.6, "freeze": 0.4}, "leave no step to the gates"),
        ({"warmup": 0.9}, "leave no step to the gates"),
        ({"lambda_bits": -1.0}, "greater than or equal to 0"),
        ({"gate_init": -1.0}, "greater than -0.93"),
        ({"gate_lr": 0.0}, "greater than 0"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Gates.model_validate(given)

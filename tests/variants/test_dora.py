"""What the paper says of DoRA, and what peft's DoRA does."""

from typing import Any

import peft
import pytest
import torch
from planted import Net, injected, net, pupil, section, taught
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import optim, variants
from lorakit.adapter import Adapter, Factors, Plan
from lorakit.variants.dora import DoRAConfig, DoRALinear


def config(**settings: Any) -> DoRAConfig:
    return DoRAConfig.model_validate({"variant": "dora", "rank": 4, "alpha": 8.0, **settings})


def moved(layer: Adapter) -> Adapter:
    """`layer` off its start."""
    for p in (layer.A, layer.B, layer.d):
        p.data += 0.3 * torch.randn_like(p)
    return layer


def weight_of(layer: Adapter) -> Tensor:
    """W', by what the layer gives for the unit vectors, without its bias."""
    return (layer(torch.eye(layer.n)) - layer.base.bias).T


def theirs(model: nn.Module, **settings: Any) -> nn.Module:
    given = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["up", "down"]}
    return peft.get_peft_model(model, peft.LoraConfig(**given, **settings))


def pairs(ours: dict[str, Adapter], wrapped: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters and peft's of the same meaning."""
    found = []
    for name, layer in ours.items():
        other = wrapped.base_model.model.get_submodule(name)
        found += [
            (layer.A, other.lora_A["default"].weight),
            (layer.B, other.lora_B["default"].weight),
            (layer.d, other.lora_magnitude_vector["default"].weight),
        ]
    return found


def twins(start: bool = False) -> tuple[Net, dict[str, Adapter], nn.Module]:
    """Our net and peft's with equal parameters, off their start unless `start`."""
    ours = net()
    layers, wrapped = injected(ours, config()), theirs(net())
    for layer in layers.values() if not start else ():
        moved(layer)
    for mine, other in pairs(layers, wrapped):
        if mine.ndim > 1 or not start:
            other.data.copy_(mine.data)
    return ours, layers, wrapped


def test_magnitudes_start_as_pefts_do() -> None:
    _, layers, wrapped = twins(start=True)
    for mine, other in pairs(layers, wrapped):
        assert_close(mine, other)


def test_outputs_and_gradients_are_pefts() -> None:
    ours, layers, wrapped = twins()
    x = torch.randn(8, 16)
    answers = ours(x), wrapped(x)
    assert_close(*answers)
    for answer in answers:
        answer.square().sum().backward()
    for mine, other in pairs(layers, wrapped):
        assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_it_trains_as_peft_does_step_by_step() -> None:
    ours, layers, wrapped = twins(start=True)
    both = [
        (m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2))
        for m in (ours, wrapped)
    ]
    for _ in range(5):
        x = torch.randn(8, 16)
        for model, optimizer in both:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, other in pairs(layers, wrapped):
        assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_rows_of_the_new_weight_are_as_long_as_their_magnitudes_say() -> None:
    layer = moved(injected(net(), config())["up"])
    assert_close(weight_of(layer).norm(dim=1), layer.d.abs())


def test_rows_of_the_new_weight_point_where_those_of_lora_do() -> None:
    layer = moved(injected(net(), config())["up"])
    layer.d.data.abs_()
    plain = layer.base.weight + layer.scale * layer.B @ layer.A
    assert_close(nn.functional.cosine_similarity(weight_of(layer), plain), torch.ones(layer.m))


def test_where_w_is_zero_the_size_of_b_changes_nothing() -> None:
    layer = injected(net(), config())["up"]
    layer.base.weight.data.zero_()
    layer = moved(DoRALinear(layer.base, config(), Plan(4, 2.0)))
    x = torch.randn(3, 16)
    before = layer(x)
    layer.B.data *= 5.0
    assert_close(layer(x), before)


def test_a_row_of_zeros_stays_finite() -> None:
    base = nn.Linear(8, 6)
    base.weight.data[2] = 0.0
    layer = DoRALinear(base, config(), Plan(4, 2.0))
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.A, layer.B, layer.d))


def test_a_bias_is_not_rescaled() -> None:
    layer = moved(injected(net(), config())["up"])
    assert_close(layer(torch.zeros(1, 16))[0], layer.base.bias)


def test_without_a_bias_it_is_the_new_weight_alone() -> None:
    layer = moved(DoRALinear(nn.Linear(8, 6, bias=False), config(), Plan(4, 2.0)))
    x = torch.randn(5, 8)
    assert_close(layer(x), x @ (layer.base.weight + layer.delta()).T)


def test_gpt2s_linear_is_taken_the_right_way_round() -> None:
    from transformers.pytorch_utils import Conv1D

    turned, straight = Conv1D(6, 8), nn.Linear(8, 6)
    straight.weight.data, straight.bias.data = turned.weight.data.T, turned.bias.data
    one, other = (DoRALinear(base, config(), Plan(4, 2.0)) for base in (turned, straight))
    moved(one)
    other.load_state_dict(one.own_state(), strict=False)
    x = torch.randn(5, 8)
    assert_close(one(x), other(x))


def test_the_norm_is_a_constant_in_backward() -> None:
    layer = moved(injected(net(), config())["up"])
    c = (layer.d / layer.norms()).detach()
    x = torch.randn(8, 16)
    dy = torch.randn(8, layer.m)
    (layer(x) * dy).sum().backward()
    assert_close(layer.B.grad, layer.scale * c[:, None] * dy.T @ (x @ layer.A.T))


def test_the_norm_is_that_of_the_sum() -> None:
    layer = moved(injected(net(), config())["down"])
    whole = layer.base.weight + layer.scale * layer.B @ layer.A
    assert_close(layer.norms(), whole.norm(dim=1))


@torch.no_grad()
def test_a_magnitude_that_grew_by_three_thousandths_is_felt_over_a_bfloat16_base() -> None:
    """1.003 is 1 in bfloat16; 0.003 is not 0."""
    layer = injected(net().bfloat16(), config())["up"]
    x = torch.randn(512, 16).bfloat16()
    before = layer(x)
    layer.d *= 1.003
    whole = (before - layer.base.bias).float()
    grown = (layer(x) - before).float() * whole.sign()
    assert float(grown.sum() / whole.abs().sum()) == pytest.approx(3e-3, rel=0.4)


def test_dropout_is_on_the_low_rank_part_alone() -> None:
    layer = injected(net(), config(dropout=0.5))["up"].train()
    layer.d.data *= 1.5
    x = torch.randn(64, 16)
    assert torch.equal(layer(x), layer(x))  # B = 0
    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_a_start_from_an_adapter_is_that_adapter() -> None:
    start = Factors(torch.randn(4, 8), torch.randn(6, 4))
    layer = DoRALinear(nn.Linear(8, 6), config(), Plan(4, 2.0, start))
    assert_close(layer.delta(), start.B @ start.A, rtol=1e-5, atol=1e-5)


def test_magnitudes_have_no_weight_decay() -> None:
    model = net()
    layers = injected(model, config())
    optimizer = optim.adamw(model, layers, section(weight_decay=0.1))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[id(layer.d)] for layer in layers.values()} == {0.0}
    assert {decay[id(layer.B)] for layer in layers.values()} == {0.1}


def test_training_moves_magnitudes() -> None:
    settings = section(steps=5)
    trainee = pupil(config(), settings)
    before = {name: layer.d.clone() for name, layer in trainee.layers.items()}
    taught(trainee, settings)
    assert all((layer.d != before[name]).all() for name, layer in trainee.layers.items())


def test_its_update_has_full_rank() -> None:
    layer = moved(injected(net(), config())["up"])
    assert not variants.get("dora").promises.low_rank
    assert torch.linalg.matrix_rank(layer.delta()) == 16

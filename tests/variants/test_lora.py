"""What the papers say of LoRA, rsLoRA and LoRA+, and of no other variant."""

from typing import Any

import pytest
import torch
from planted import added, injected, net, pupil, section
from torch import nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.variants.lora import LoRAConfig


def config(**settings: Any) -> LoRAConfig:
    return LoRAConfig.model_validate({"variant": "lora", "rank": 4, "alpha": 8.0, **settings})


def test_the_update_is_s_b_a() -> None:
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    x = torch.randn(3, 16)
    assert_close(added(layer, x), (8 / 4) * x @ layer.A.T @ layer.B.T)
    assert_close(layer(x), layer.base(x) + added(layer, x))


def test_a_starts_uniform_within_one_over_root_n_and_b_at_zero() -> None:
    layer = injected(net(), config(rank=16))["down"]  # n = 48
    assert layer.A.abs().max() <= 48**-0.5
    assert layer.A.std().item() == pytest.approx((1 / (3 * 48)) ** 0.5, rel=0.1)
    assert not layer.B.any()


def test_the_first_gradient_reaches_b_and_not_a() -> None:
    model = net()
    layer = injected(model, config())["up"]
    model(torch.randn(8, 16)).square().sum().backward()
    assert layer.B.grad.abs().max() > 0
    assert not layer.A.grad.any()


def test_moving_a_factor_of_c_between_a_and_b_changes_nothing() -> None:
    layer = injected(net(), config())["up"]
    nn.init.normal_(layer.B)
    x = torch.randn(3, 16)
    before = added(layer, x)
    layer.A.data *= 4.0
    layer.B.data /= 4.0
    assert_close(added(layer, x), before)


def test_the_update_has_rank_r_at_most() -> None:
    layer = injected(net(), config(rank=3))["down"]
    nn.init.normal_(layer.B)
    A, B = layer.factors()
    assert torch.linalg.matrix_rank(B @ A) == 3


def test_rslora_divides_alpha_by_the_root_of_the_rank() -> None:
    assert config(rank=16, alpha=16.0, rslora=True).scale == 4.0
    assert config(rank=16, alpha=16.0).scale == 1.0


def test_lora_plus_moves_b_at_its_ratio_times_the_rate_of_a() -> None:
    model = net()
    layers = injected(model, config(lr_ratio=16.0))
    optimizer = optim.adamw(model, layers, section(lr=1e-3))
    rate = optim.rates(optimizer)
    assert {rate(layer.A) for layer in layers.values()} == {1e-3}
    assert {rate(layer.B) for layer in layers.values()} == {1.6e-2}


def test_dropout_is_on_the_update_alone() -> None:
    model = net()
    layer = injected(model, config(dropout=0.5))["up"].train()
    x = torch.randn(64, 16)
    assert torch.equal(layer(x), layer.base(x))  # B = 0: only the base's path is seen
    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_it_trains_as_peft_does_step_by_step() -> None:
    """peft's LoRA from the same start, AdamW, five steps: the same A and B."""
    import peft

    ours, theirs = net(), net()
    settings = section(steps=5)
    trainee = pupil(config(), settings, ours)
    wrapped = peft.get_peft_model(
        theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"])
    )
    pairs = {name: wrapped.base_model.model.get_submodule(name) for name in trainee.layers}
    for name, layer in trainee.layers.items():
        pairs[name].lora_A["default"].weight.data.copy_(layer.A.data)
    mine, other = (
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
        for m in (ours, wrapped)
    )
    for _ in range(5):
        x = torch.randn(8, 16)
        for model, optimizer in ((ours, mine), (wrapped, other)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in trainee.layers.items():
        assert_close(layer.A.data, pairs[name].lora_A["default"].weight.data)
        assert_close(layer.B.data, pairs[name].lora_B["default"].weight.data)

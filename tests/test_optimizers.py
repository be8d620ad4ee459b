"""bitsandbytes' optimizers: 8-bit moments, paged memory, stopped and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from planted import section
from torch import nn
from torch.testing import assert_close

from lorakit import optim
from lorakit.adapter import Plan
from lorakit.errors import RecipeError
from lorakit.prepare import prepare
from lorakit.recipe import load as read
from lorakit.variants.lora import LoRAConfig, LoRALinear

BITSANDBYTES = ("adamw8bit", "paged_adamw8bit", "paged_adamw32bit")


def wide(optimizer: str, **settings: Any) -> tuple[LoRALinear, torch.optim.Optimizer]:
    """A layer whose A has 8,192 numbers, B 256, and its optimizer."""
    torch.manual_seed(0)
    plan = Plan(4, 1.0)
    layer = LoRALinear(nn.Linear(2048, 64), LoRAConfig(variant="lora", rank=4), plan)
    return layer, optim.adamw(layer, {"": layer}, section(optimizer=optimizer, **settings))


def step(layer: LoRALinear, optimizer: torch.optim.Optimizer, count: int = 5) -> None:
    x = torch.randn(8, 2048, generator=torch.Generator().manual_seed(1))
    for _ in range(count):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_each_steps_nearly_as_torchs_adamw_does(name: str) -> None:
    theirs, ours = wide(name, lr=1e-3, weight_decay=0.1), wide("adamw", lr=1e-3, weight_decay=0.1)
    start = ours[0].A.detach().clone()
    for layer, optimizer in (theirs, ours):
        step(layer, optimizer)
    difference = (theirs[0].A - ours[0].A).norm() / (ours[0].A - start).norm()
    assert difference < (1e-3 if name.endswith("32bit") else 0.1)


@pytest.mark.parametrize("name", BITSANDBYTES)
def test_moments_of_large_tensors_alone_are_stored_in_8_bits(name: str) -> None:
    layer, optimizer = wide(name)
    step(layer, optimizer)
    large, small = (optimizer.state[p]["state1"].dtype for p in (layer.A, layer.B))
    assert large == (torch.uint8 if name.endswith("8bit") else torch.float32)
    assert small == torch.float32


def test_without_a_gpu_a_paged_optimizer_is_the_plain_one() -> None:
    ended = []
    for name in ("adamw8bit", "paged_adamw8bit"):
        layer, optimizer = wide(name)
        step(layer, optimizer)
        ended.append(layer.A)
    assert torch.equal(*ended)


def test_what_a_name_does_not_keep_is_said() -> None:
    layer, _ = wide("adamw")
    assert optim.notes(layer, section()) == ()
    bits, paging = optim.notes(layer, section(optimizer="paged_adamw8bit"))
    assert bits.startswith("paged_adamw8bit: 97% of the trained numbers have moments in 8 bits")
    assert "without a GPU there is nothing to page" in paging


def test_second_moments_are_those_of_torch_or_refused_in_8_bits() -> None:
    found = []
    for name in ("adamw", "paged_adamw32bit"):
        layer, optimizer = wide(name)
        v_hat = optim.second_moments(optimizer)
        assert torch.equal(v_hat(layer.A), torch.zeros_like(layer.A))
        step(layer, optimizer, count=3)
        found.append(v_hat(layer.B))
    assert found[0].max() > 0
    assert_close(*found, rtol=1e-4, atol=0)
    layer, optimizer = wide("adamw8bit")
    step(layer, optimizer, count=1)
    v_hat = optim.second_moments(optimizer)
    assert v_hat(layer.B).shape == layer.B.shape  # stored in 32 bits
    with pytest.raises(RecipeError, match=r"train.optimizer: .* rounds to 8 bits"):
        v_hat(layer.A)


@pytest.mark.parametrize("name", ["adamw", *BITSANDBYTES])
def test_moments_follow_the_ranks_a_layer_keeps_but_not_in_8_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoRALinear, "ranked", {"A": 0, "B": 1})
    layer, optimizer = wide(name)
    step(layer, optimizer)
    second = "exp_avg_sq" if name == "adamw" else "state2"
    before = optimizer.state[layer.B][second].clone()
    kept = torch.tensor([1, 3])
    shrunk = layer.compact(kept)
    if name.endswith("8bit"):
        with pytest.raises(RecipeError, match="8-bit moments cannot be compacted"):
            optim.compact(optimizer, shrunk, kept)
        return
    optim.compact(optimizer, shrunk, kept)
    assert torch.equal(optimizer.state[layer.B][second], before[:, kept])
    step(layer, optimizer)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_recomputed_activations_give_the_same_gradients(recipe: Path, quantize: str | None) -> None:
    given = yaml.safe_load(recipe.read_text())
    given["model"]["quantize"] = quantize
    gradients, losses = [], []
    for recomputed in (False, True):
        given["train"]["activation_checkpointing"] = recomputed
        recipe.write_text(yaml.safe_dump(given))
        prepared = prepare(read(recipe))
        model = prepared.base.model.train()
        assert model.is_activation_checkpointing == recomputed
        with torch.no_grad():
            for layer in prepared.layers.values():
                layer.B.fill_(0.1)
        torch.manual_seed(1)  # of dropout, which is drawn again the same way
        loss = prepared.task.loss(model, next(prepared.task.steps(8, 1, 0))[0])
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert torch.equal(*losses)
    assert_close(*gradients, rtol=0, atol=0)

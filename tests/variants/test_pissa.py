"""What the paper says of PiSSA; what holds for every subtracted start is told in test_olora.py."""

from typing import Any

import peft
import pytest
import torch
from planted import injected, net
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorakit.adapter import Plan
from lorakit.variants.pissa import PiSSAConfig, PiSSALinear

SHAPES = [(24, 40), (40, 24), (32, 32)]  # (m, n): wide, tall, square
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**settings: Any) -> PiSSAConfig:
    return PiSSAConfig.model_validate({"variant": "pissa", "rank": 4, "alpha": 8.0, **settings})


def over(W: Tensor, scale: float = 2.0, rank: int = 4, **settings: Any) -> PiSSALinear:
    base = nn.Linear(W.shape[1], W.shape[0])
    base.weight.data.copy_(W)
    return PiSSALinear(base, config(**settings), Plan(rank, scale))


@pytest.fixture(name="W", params=SHAPES)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param)


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5])
def test_s_b0_a0_is_the_best_approximation_of_w_at_rank_r_at_every_scale(
    W: Tensor, scale: float
) -> None:
    """Its error is what Eckart and Young allow: the norm of the singular values left out."""
    adapted = over(W, scale)
    start = scale * adapted.B0 @ adapted.A0
    assert torch.linalg.matrix_rank(start) == 4
    assert_close((W - start).norm(), torch.linalg.svdvals(W)[4:].norm(), rtol=1e-4, atol=1e-5)


def test_the_factors_are_balanced(W: Tensor) -> None:
    adapted = over(W)
    values = torch.diag(torch.linalg.svdvals(W)[:4] / 2.0)  # over s
    assert_close(adapted.A0 @ adapted.A0.T, values, **CLOSE)
    assert_close(adapted.B0.T @ adapted.B0, values, **CLOSE)


def test_a_fresh_adapter_adds_exactly_0(W: Tensor) -> None:
    adapted = over(W)
    x = torch.randn(3, 5, adapted.n)
    assert torch.equal(adapted(x), adapted.base(x))
    assert not adapted.delta().any()


def test_a_rank_without_singular_value_starts_at_0_and_adds_exactly_0() -> None:
    adapted = over(torch.zeros(24, 40))
    assert not adapted.A0.any()
    assert not adapted.B0.any()
    x = torch.randn(3, 40)
    assert torch.equal(adapted(x), adapted.base(x))


def test_a_conv1d_is_adapted_as_the_linear_it_is() -> None:
    conv = Conv1D(24, 40)
    one = PiSSALinear(conv, config(), Plan(4, 2.0))
    assert_close(one.B0 @ one.A0, (other := over(conv.weight.T)).B0 @ other.A0, **CLOSE)
    x = torch.randn(3, 40)
    assert torch.equal(one(x), conv(x))


def test_a_few_iterations_come_near_the_exact_start() -> None:
    falling = torch.diag(0.8 ** torch.arange(32).float())
    U, V = (torch.linalg.qr(torch.randn(side, 32)).Q for side in (48, 40))
    W = U @ falling @ V.T
    exact, quick = over(W), over(W, iterations=8)
    product = exact.B0 @ exact.A0
    assert (quick.B0 @ quick.A0 - product).norm() < 0.02 * product.norm()
    assert not quick.delta().any()
    with pytest.raises(ValidationError, match="iterations"):
        config(iterations=0)


def test_trained_side_by_side_with_peft_it_is_the_same_model() -> None:
    """Plain descent: Adam would amplify the rounding of peft's edited weight."""
    ours, theirs = net(), net()
    layers = injected(ours, config())
    wrapped = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights="pissa"
        ),
    )
    for name, adapted in layers.items():
        pair = wrapped.base_model.model.get_submodule(name)
        A0, B0 = (side["default"].weight.data for side in (pair.lora_A, pair.lora_B))
        assert_close(adapted.B0 @ adapted.A0, B0 @ A0, **CLOSE)
    first = ours(torch.ones(1, 16)).detach()
    for x in torch.randn(5, 8, 16):
        answers = []
        for model in (ours, wrapped):
            answers.append(y := model(x))
            y.square().mean().backward()
            for p in (p for p in model.parameters() if p.requires_grad):
                p.data -= 0.02 * p.grad
                p.grad = None
        assert_close(*answers, rtol=1e-3, atol=1e-4)
    assert (ours(torch.ones(1, 16)) - first).abs().max() > 0.01

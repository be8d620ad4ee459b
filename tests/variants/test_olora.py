"""What the paper says of OLoRA, and that leaving W alone changes none of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from planted import added, injected, net, pupil, section, taught
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorakit import variants
from lorakit.adapter import Plan
from lorakit.base import dense_weight
from lorakit.errors import RecipeError
from lorakit.inject import plan, sites
from lorakit.variants.olora import OLoRAConfig, OLoRALinear

SHAPES = [(24, 40), (40, 24), (32, 32)]  # (m, n): wide, tall, square
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config(**settings: Any) -> OLoRAConfig:
    return OLoRAConfig.model_validate({"variant": "olora", "rank": 4, "alpha": 8.0, **settings})


def layer(base: nn.Module, rank: int = 4, scale: float = 2.0, fresh: bool = True) -> OLoRALinear:
    return OLoRALinear(base, config(), Plan(rank, scale, fresh=fresh))


def linear(shape: tuple[int, int]) -> nn.Linear:
    return nn.Linear(shape[1], shape[0])


@torch.no_grad()
def moved(adapted: OLoRALinear, by: float = 0.1) -> OLoRALinear:
    """`adapted` after some training."""
    for p in (adapted.A, adapted.B):
        p.add_(by * torch.randn_like(p))
    return adapted


@pytest.fixture(name="W", params=SHAPES)
def weight(request: pytest.FixtureRequest) -> Tensor:
    return torch.randn(request.param)


def over(W: Tensor, **settings: Any) -> OLoRALinear:
    base = linear((W.shape[0], W.shape[1]))
    base.weight.data.copy_(W)
    return layer(base, **settings)


# --- the start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5, 8 / 4**0.5])
def test_a_fresh_adapter_adds_exactly_0_at_every_scale(
    W: Tensor, scale: float, dtype: torch.dtype
) -> None:
    adapted = over(W.to(dtype), scale=scale).to(dtype=torch.float32)
    adapted.base.to(dtype)
    x = torch.randn(5, adapted.n).to(dtype)
    assert not added(adapted, x).any()
    assert torch.equal(adapted(x), adapted.base(x))


def test_it_starts_at_the_first_rows_and_columns_of_the_whole_qr(W: Tensor) -> None:
    Q, R = torch.linalg.qr(W)
    adapted = over(W)
    assert_close(adapted.B0, Q[:, :4], **CLOSE)
    assert_close(adapted.A0, R[:4], **CLOSE)


def test_b0_is_orthonormal_and_a0_upper_trapezoidal(W: Tensor) -> None:
    adapted = over(W)
    assert_close(adapted.B0.T @ adapted.B0, torch.eye(4), **CLOSE)
    assert not adapted.A0.tril(-1).any()


def test_the_start_is_w_projected_on_its_own_first_columns(W: Tensor) -> None:
    adapted = over(W)
    first = W[:, :4]
    projection = first @ torch.linalg.pinv(first)
    assert_close(adapted.B0 @ adapted.A0, projection @ W, **CLOSE)
    assert_close((adapted.B0 @ adapted.A0)[:, :4], first, **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_of_the_first_columns_the_share_1_minus_s_is_left_in_the_residual(
    W: Tensor, scale: float
) -> None:
    """The factors aren't divided by s."""
    adapted = over(W, scale=scale)
    residual = W - scale * adapted.B0 @ adapted.A0
    assert_close(residual[:, :4], (1 - scale) * W[:, :4], **CLOSE)


def test_at_the_full_rank_the_start_is_w_itself(W: Tensor) -> None:
    adapted = over(W, rank=min(W.shape), scale=1.0)
    assert_close(adapted.B0 @ adapted.A0, W, **CLOSE)


def test_double_precision_finds_the_same_start(W: Tensor) -> None:
    """B0 A0 is unique, so that two devices or two processes agree on it up to rounding."""
    Q, R = torch.linalg.qr(W.double())
    adapted = over(W)
    assert_close(adapted.B0 @ adapted.A0, (Q[:, :4] @ R[:4]).float(), **CLOSE)


def test_the_signs_of_the_qr_do_not_matter() -> None:
    adapted = moved(layer(linear((24, 40))))
    x = torch.randn(3, 40)
    before = adapted(x)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0])
    for A, B in ((adapted.A0, adapted.B0), (adapted.A.data, adapted.B.data)):
        A *= sign[:, None]
        B *= sign
    assert_close(adapted(x), before)


@pytest.mark.parametrize("deficient", ["zero", "one rank", "first columns equal"])
def test_a_weight_of_low_rank_gives_a_finite_start_that_adds_exactly_0(deficient: str) -> None:
    W = torch.zeros(24, 40)
    if deficient == "one rank":
        W = torch.randn(24, 1) @ torch.randn(1, 40)
    if deficient == "first columns equal":
        W = torch.randn(24, 40)
        W[:, :4] = W[:, :1]
    adapted = over(W)
    assert adapted.A0.isfinite().all()
    assert_close(adapted.B0.T @ adapted.B0, torch.eye(4), **CLOSE)
    x = torch.randn(3, 40)
    assert torch.equal(adapted(x), adapted.base(x))


def test_a_conv1d_is_adapted_as_the_linear_it_is() -> None:
    """GPT-2 keeps W as (n, m)."""
    theirs, ours = Conv1D(24, 40), linear((24, 40))
    ours.weight.data.copy_(theirs.weight.T)
    ours.bias.data.copy_(theirs.bias)
    one, other = layer(theirs), layer(ours)
    for name, value in one.own_state().items():
        assert_close(value, other.own_state()[name], **CLOSE)
    x = torch.randn(3, 40)
    assert torch.equal(one(x), theirs(x))
    assert_close(one(x), other(x), **CLOSE)


def test_a_rank_above_the_matrix_is_refused() -> None:
    model, asked = net(), config(rank=17)
    with pytest.raises(RecipeError, match="rank 17 is larger than its matrix, 48 x 16"):
        plan(asked, sites(model, asked, ()))


def test_ranks_may_differ_by_module_and_all_start_exactly() -> None:
    model, x = net(), torch.randn(4, 16)
    before = model(x)
    layers = injected(model, config(), ranks={"up": 3, "down": 16})
    assert layers["up"].A0.shape == (3, 16)
    assert layers["down"].A0.shape == (16, 48)
    assert torch.equal(model(x), before)


def test_a_start_from_an_earlier_adapter_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValidationError, match="`variant: lora` goes on from an adapter"):
        config(init_from="runs/earlier")
    assert config(ranks_from="runs/earlier").ranks_from == "runs/earlier"


# --- training


def test_both_factors_are_trained_and_nothing_else() -> None:
    model = net()
    layers = injected(model, config())
    for adapted in layers.values():
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert set(trained) == {"A", "B"}
        assert sum(p.numel() for p in trained.values()) == 4 * (adapted.n + adapted.m)
    model(torch.randn(8, 16)).square().sum().backward()
    for adapted in layers.values():
        assert adapted.A.grad.abs().max() > 0  # LoRA's A has none at first
        assert adapted.B.grad.abs().max() > 0
        assert adapted.base.weight.grad is None


def test_training_moves_both_factors_leaves_the_start_and_keeps_no_orthonormality() -> None:
    settings = section(steps=5)
    trainee = pupil(config(), settings)
    before = {name: adapted.A0.clone() for name, adapted in trainee.layers.items()}
    taught(trainee, settings)
    for name, adapted in trainee.layers.items():
        assert torch.equal(adapted.A0, before[name])
        assert not torch.equal(adapted.A, adapted.A0)
        assert not torch.equal(adapted.B, adapted.B0)
        assert (adapted.B.T @ adapted.B - torch.eye(4)).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [2.0, 1.0, 0.5])
def test_outputs_and_gradients_are_those_of_the_papers_edited_weight(
    W: Tensor, scale: float
) -> None:
    """y = W_res x + s B A x, with W_res = W - s B0 A0."""
    adapted = moved(over(W, scale=scale))
    A, B = (p.detach().clone().requires_grad_() for p in (adapted.A, adapted.B))
    residual = W - scale * adapted.B0 @ adapted.A0
    x, x2 = (torch.randn(8, W.shape[1], generator=torch.Generator().manual_seed(4)) for _ in "12")
    x, x2 = x.requires_grad_(), x2.requires_grad_()
    y, y2 = adapted(x), x2 @ residual.T + scale * x2 @ A.T @ B.T + adapted.base.bias
    close = {"rtol": 1e-4, "atol": 1e-4}
    assert_close(y, y2, **close)
    y.square().sum().backward()
    y2.square().sum().backward()
    for ours, theirs in ((adapted.A, A), (adapted.B, B), (x, x2)):
        assert_close(ours.grad / theirs.grad.abs().max(), theirs.grad / theirs.grad.abs().max())


def test_trained_side_by_side_with_peft_it_is_the_same_model() -> None:
    ours, theirs, data = net(), net(), torch.randn(5, 8, 16)
    layers = injected(ours, config())
    wrapped = peft.get_peft_model(
        theirs,
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["up", "down"], init_lora_weights="olora"
        ),
    )
    for name, adapted in layers.items():
        pair = wrapped.base_model.model.get_submodule(name)
        A0, B0 = (side["default"].weight for side in (pair.lora_A, pair.lora_B))
        assert_close(adapted.A0, A0.data, **CLOSE)
        assert_close(adapted.B0, B0.data, **CLOSE)
    assert_close(trained_outputs(ours, data), trained_outputs(wrapped, data), rtol=1e-3, atol=1e-4)


def trained_outputs(model: nn.Module, data: Tensor) -> Tensor:
    """The answers along steps of plain descent, which amplifies no rounding as Adam does."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    answers = []
    for x in data:
        y = model(x)
        answers.append(y.detach())
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved_by = (answers[0] - model(data[0])).abs().max()
    assert moved_by > 0.01
    return torch.stack([*answers, model(data[0]).detach()])


def test_over_bfloat16_small_steps_are_seen_that_two_products_would_round_away() -> None:
    """The difference of two bfloat16 products has an error of 2^-8 of each, however small it is."""
    adapted = moved(layer(linear((64, 64)).bfloat16()).float(), by=1e-4)
    x = torch.randn(32, 64).bfloat16()
    A, B = adapted.factors()
    exact = x.float() @ A.T @ B.T
    A, B, A0, B0 = (t.detach().bfloat16() for t in (adapted.A, adapted.B, adapted.A0, adapted.B0))
    apart = 2 * (x @ A.T @ B.T - x @ A0.T @ B0.T)

    def error(y: Tensor) -> float:
        return float((y.detach().float() - exact).norm() / exact.norm())

    assert error(added(adapted, x)) < 0.02
    assert error(apart) > 0.5


# --- what comes out


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_the_plain_pair_of_rank_2r_does_on_w_what_b_a_does_on_the_residual(
    W: Tensor, scale: float
) -> None:
    adapted = over(W, scale=scale)
    assert not adapted.delta().any()  # before training
    moved(adapted)
    A, B = adapted.factors()
    assert A.shape[0] == B.shape[1] == 2 * adapted.rank() == 8
    residual = W - scale * adapted.B0 @ adapted.A0
    assert_close(W + B @ A, residual + scale * adapted.B.data @ adapted.A.data, **CLOSE)
    assert torch.linalg.matrix_rank(B @ A) == 8


def test_the_base_is_never_edited_so_adapters_share_it_and_come_off() -> None:
    base = linear((24, 40))
    before, x = base.weight.detach().clone(), torch.randn(3, 40)
    one, other = moved(layer(base)), moved(layer(base, rank=3, scale=1.0))
    assert torch.equal(one.base.weight, before)
    for adapted in (one, other):
        assert_close(adapted(x), base(x) + x @ adapted.delta().T, **CLOSE)


def test_saved_and_loaded_it_takes_its_start_from_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = linear((24, 40))
    trained = moved(layer(base))
    assert set(trained.own_state()) == {"A", "B", "A0", "B0"}
    monkeypatch.delattr(OLoRALinear, "start")
    loaded = layer(base, fresh=False)
    for name, value in loaded.own_state().items():
        value.copy_(trained.own_state()[name])
    x = torch.randn(3, 40)
    assert torch.equal(loaded(x), trained(x))


def test_pruned_it_has_twice_the_rank_says_why_and_may_be_cut(
    recipe: Path, lorakit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = ("adapter.variant=olora", "adapter.rank=4", "train.lr=0.01")
    assert lorakit("train", recipe, *adapter).code == 0
    monkeypatch.delattr(OLoRALinear, "start")  # from here on starts are only read
    exact = lorakit("prune", "runs/tiny")
    assert exact.code == 0, exact.err
    assert "the start, which is subtracted" in " ".join((exact.out + exact.err).split())
    before, after = (lorakit("eval", path) for path in ("runs/tiny", "runs/tiny/pruned"))
    assert before.code == after.code == 0
    assert peft.PeftConfig.from_pretrained("runs/tiny/pruned").r == 8
    assert "takes as many again" in Path("runs/tiny/pruned/README.md").read_text()
    halved = lorakit("prune", "runs/tiny", "--rank", "4", "--out", "cut", "--json")
    assert halved.code == 0, halved.err
    assert peft.PeftConfig.from_pretrained("cut").r == 4
    assert "the start, which is subtracted" not in halved.err


# --- over a quantised base


def nf4(shape: tuple[int, int]) -> nn.Module:
    coded = bnb.nn.Linear4bit(shape[1], shape[0], quant_type="nf4")
    coded.load_state_dict(linear(shape).state_dict())
    coded = coded.to("cpu")
    coded.support_avx512bf16_for_cpu = False  # its repacking loses the gradient to the input
    return coded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_over_4_bit_codes_the_start_is_exact_and_training_moves_dw_alone(
    dtype: torch.dtype,
) -> None:
    adapted = layer(nf4((64, 128)))
    W, x = dense_weight(adapted.base), torch.randn(3, 128).to(dtype)
    Q, R = torch.linalg.qr(W)
    assert_close(adapted.B0 @ adapted.A0, Q[:, :4] @ R[:4], **CLOSE)
    assert torch.equal(adapted(x), adapted.base(x))
    optimizer = torch.optim.SGD([adapted.A, adapted.B], lr=1e-2)
    for training in (True, False, True):  # an evaluation between
        adapted.train(training)
        adapted(x).float().square().mean().backward()
        optimizer.step()
    assert not torch.equal(adapted.B, adapted.B0)
    assert torch.equal(dense_weight(adapted.base), W)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.02}
    changed = adapted(x) - adapted.base(x)
    assert changed.abs().max() > 1e-3
    assert_close(changed.float(), x.float() @ adapted.delta().T, **rounding)


def test_quantising_the_residual_would_come_nearer_to_w_as_the_paper_has_it() -> None:
    """What the edited weight is good for, and W left alone gives up: nuclear norms, NF4."""
    spectrum = torch.diag(torch.arange(1, 65).float() ** -1.0)
    W = torch.randn(64, 64) @ spectrum @ torch.randn(64, 64)

    def error(residual: Tensor, start: Tensor) -> float:
        codes = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        codes.load_state_dict({"weight": residual})
        return float(torch.linalg.matrix_norm(W - start - dense_weight(codes.to("cpu")), "nuc"))

    adapted = over(W, rank=16, scale=1.0)
    start = adapted.B0 @ adapted.A0
    assert error(W - start, start) < error(W, torch.zeros(64, 64))


def test_it_has_no_settings_but_where_else_its_weights_may_come_from() -> None:
    common: Mapping[str, Any] = variants.get("lora").config.model_fields
    assert set(OLoRAConfig.model_fields) - set(common) == {"source"}

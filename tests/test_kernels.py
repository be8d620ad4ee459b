"""What a CPU computes in another way is the same: judged by transformers and torch themselves."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit.models import kernels
from lorakit.models.heads import Head

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}
OF_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50}
FAMILIES = tuple(dict.fromkeys((*kernels.PLAIN, *kernels.POOLED)))
OTHERS = ("modernbert", "gpt2", "llama")
BOTH = Head(("yes", "no"))


def fresh(kind: str) -> Any:
    """A tiny random classifier of a family, as transformers has it, without dropout."""
    torch.manual_seed(0)
    sizes = OF_DISTILBERT if kind == "distilbert" else SIZES
    config = transformers.AutoConfig.for_model(
        kind, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1
    )
    return transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    ).eval()


def answers(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of rows of unequal length, and the gradients of their squares."""
    ids = torch.randint(3, 50, (5, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1, 7, 9])[:, None]).long()
    logits = model(input_ids=ids * mask, attention_mask=mask).logits
    model.zero_grad()
    logits.square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found


@pytest.mark.parametrize("kind", [*FAMILIES, *OTHERS])
def test_answers_and_gradients_are_those_of_transformers(kind: str) -> None:
    model = fresh(kind)
    logits, gradients = answers(model)
    kernels.install(model, BOTH)
    ours, of_ours = answers(model)
    assert logits.std() > 1e-3
    assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    assert_close(of_ours, gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("keys", [1, 4, 15, 16, 17, 31, 32, 33])
def test_softmax_of_narrow_rows_is_torchs(keys: int, dtype: torch.dtype) -> None:
    drawn = torch.randn(3, 2, 5, keys, generator=torch.Generator().manual_seed(2)).to(dtype)
    drawn[0, 0, 0, keys // 2 :] = torch.finfo(dtype).min  # as transformers' masks have it
    drawn[0, 0, 1] = torch.finfo(dtype).min
    x, y = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    ours, theirs = kernels._softmax(x), y.softmax(-1)
    back = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    ours.backward(back)
    theirs.backward(back)
    assert ours.shape == theirs.shape
    assert_close(ours, theirs)
    assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", kernels.PLAIN)
def test_attention_is_ours_where_it_is_the_familys_own(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        calls.append(given)
        return attention(*given, **named)

    attention = kernels.attention
    monkeypatch.setattr(kernels, "attention", counted)
    model = fresh(kind)
    kernels.install(model, BOTH)
    answers(model)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", kernels.POOLED)
def test_the_last_block_computes_one_token_of_each_row(kind: str) -> None:
    seen: dict[int, torch.Size] = {}
    model = fresh(kind)
    kernels.install(model, BOTH)
    for number, block in enumerate(model.base_model.encoder.layer):
        block.intermediate.register_forward_pre_hook(
            lambda _, inputs, number=number: seen.update({number: inputs[0].shape})
        )
    answers(model)
    assert seen == {0: (5, 9, 16), 1: (5, 1, 16)}


def test_a_head_that_reads_every_token_gets_every_token() -> None:
    config = transformers.AutoConfig.for_model("bert", **SIZES)
    model = transformers.AutoModelForTokenClassification.from_config(config)
    kernels.install(model, Head(("yes", "no"), "TOKEN_CLS"))
    assert model(input_ids=torch.ones(2, 7, dtype=torch.long)).logits.shape == (2, 7, 2)


@pytest.mark.parametrize("kind", kernels.PLAIN)
def test_maps_of_some_rows_at_a_time_are_those_of_all(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh(kind)
    kernels.install(model, BOTH)
    whole = answers(model)
    monkeypatch.setattr(kernels, "MAPS", 4 * 2 * 2 * 9 * 9)  # two of the five rows
    assert_close(answers(model), whole, rtol=1e-5, atol=1e-7)


def test_no_map_is_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, whole = [], kernels._attention

    def counted(query: Tensor, key: Tensor, *given: Any) -> Tensor:
        maps.append(query.size(0) * query.size(1) * query.size(2) * key.size(2))
        return whole(query, key, *given)

    monkeypatch.setattr(kernels, "_attention", counted)
    monkeypatch.setattr(kernels, "MAPS", 4000)
    q = torch.randn(7, 2, 12, 4)
    found, _ = kernels.attention(nn.Identity(), q, q, q, torch.zeros(1, 1, 12, 12))
    assert maps == [864, 864, 288]  # three rows, three, one
    assert found.shape == (7, 12, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3])
def test_dropout_keeps_its_share_and_the_mean(dtype: torch.dtype, p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    y = kernels.dropout(x, p)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p), dtype=dtype))}
    n = x.numel()
    error = float((y == 0).sum()) / n - p
    assert abs(error) < 4 * (p * (1 - p) / n) ** 0.5 + 2**-16  # four standard deviations
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())  # what is 0 passes nothing back


def test_dropout_of_neighbours_and_of_draws_is_independent() -> None:
    """Four numbers share one draw of 64 bits: none tells of another."""
    torch.manual_seed(0)
    one, two = ((kernels.dropout(torch.ones(2**20), 0.5) > 0).float() for _ in range(2))
    assert abs(float((one * two).mean()) - 0.25) < 0.002
    for apart in (1, 2, 3, 4):
        both = float((one[:-apart] * one[apart:]).mean())
        assert abs(both - 0.25) < 0.002, apart


def test_dropout_follows_the_seed_and_is_off_in_evaluation() -> None:
    x, layer = torch.randn(7, 3), kernels.Dropout(0.3)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(layer(x))
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], x)
    assert layer.eval()(x) is x


def test_every_dropout_of_a_model_is_ours() -> None:
    model = fresh("bert")
    shares = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    kernels.install(model, BOTH)
    ours = [m.p for m in model.modules() if isinstance(m, kernels.Dropout)]
    assert ours == shares
    assert len(ours) == 8

"""W, whatever a linear stores it in: as floats, the other way round, or as codes."""

from collections.abc import Callable

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lorakit.base import dense_weight, device_of, is_linear, widths

N, M = 64, 96


def four_bit(kind: str, nested: bool) -> nn.Module:
    coded = bnb.nn.Linear4bit(N, M, quant_type=kind, compress_statistics=nested)
    return at_rest(coded)


def at_rest(coded: nn.Module) -> nn.Module:
    """Quantised, which bitsandbytes does on the way to a device, and never repacked."""
    coded.load_state_dict(nn.Linear(N, M).state_dict())
    coded = coded.to("cpu")
    coded.support_avx512bf16_for_cpu = False
    return coded


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N, M),
    "conv1d": lambda: Conv1D(M, N),
    "nf4": lambda: four_bit("nf4", nested=False),
    "nf4, nested": lambda: four_bit("nf4", nested=True),
    "fp4": lambda: four_bit("fp4", nested=True),
    "int8": lambda: at_rest(bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False)),
}


@pytest.fixture(params=LINEARS)
def linear(request: pytest.FixtureRequest) -> nn.Module:
    return LINEARS[request.param]()


def test_it_is_a_linear_of_those_widths_on_that_device(linear: nn.Module) -> None:
    assert is_linear(linear)
    assert widths(linear) == (N, M)
    assert device_of(linear) == torch.device("cpu")


def test_the_dense_weight_is_m_by_n_in_float32_and_detached(linear: nn.Module) -> None:
    W = dense_weight(linear)
    assert W.shape == (M, N)
    assert W.dtype == torch.float32
    assert not W.requires_grad


def test_the_dense_weight_is_the_map_that_the_linear_computes(linear: nn.Module) -> None:
    x = torch.randn(5, N, requires_grad=True)
    rounding = {"rtol": 0, "atol": 1e-5}
    assert_close(linear(x), x @ dense_weight(linear).T + linear.bias, **rounding)


def test_asking_for_it_changes_nothing(linear: nn.Module) -> None:
    before = {name: value.clone() for name, value in linear.state_dict().items()}
    first = dense_weight(linear)
    assert torch.equal(dense_weight(linear), first)
    assert_close(dict(linear.state_dict()), before, rtol=0, atol=0)


def test_a_bfloat16_weight_keeps_its_values() -> None:
    linear = nn.Linear(N, M).bfloat16()
    assert torch.equal(dense_weight(linear).bfloat16(), linear.weight)


def test_8_bit_codes_keep_their_row_scales_after_the_first_forward_moved_them() -> None:
    linear = LINEARS["int8"]()
    before = dense_weight(linear)
    linear(torch.randn(2, N))
    assert linear.weight.SCB is None  # moved
    assert torch.equal(dense_weight(linear), before)


def test_codes_are_nearer_to_the_weight_than_half_their_widest_step() -> None:
    """NF4's widest gap is 0.304 of a block's largest magnitude, int8's 1/127 of a row's."""
    plain = nn.Linear(N, M)
    for coded, gap in (
        (bnb.nn.Linear4bit(N, M, quant_type="nf4", compress_statistics=False), 0.304),
        (bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False), 1 / 127),
    ):
        coded.load_state_dict(plain.state_dict())
        error = (dense_weight(coded.to("cpu")) - plain.weight).abs().max()
        assert 0 < error <= 1.1 * gap / 2 * plain.weight.abs().max()  # scales are rounded too


def test_what_is_to_be_quantised_later_is_read_as_it_is() -> None:
    for linear in (bnb.nn.Linear4bit(N, M), bnb.nn.Linear8bitLt(N, M, has_fp16_weights=False)):
        assert torch.equal(dense_weight(linear), linear.weight)


def test_what_is_no_linear_and_a_subclass_of_one_are_left_alone() -> None:
    class Owned(nn.Linear):
        """As torch's attention has one: its weight is read, it is never called."""

    assert not is_linear(Owned(2, 2))
    assert not is_linear(nn.Conv1d(2, 2, 1))
    assert not is_linear(nn.Embedding(2, 2))
    assert not is_linear(nn.MultiheadAttention(4, 2).out_proj)

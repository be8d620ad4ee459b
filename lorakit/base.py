"""The linears that can be wrapped, whatever their storage.

Conv1D and bitsandbytes' linears are known by name: to import their packages costs seconds.

Over codes a linear is to compute one map, in training and in evaluation, before and after; what
bitsandbytes 0.50 does otherwise on CPUs is turned off by `settled`.
"""

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

Codes = Literal["nf4", "fp4", "int8"]
"""What codes a weight is stored in: 4 bits with a scale for 64 numbers (QLoRA, Dettmers et al.
2023, arXiv:2305.14314), or 8 bits with a scale for a row (LLM.int8(), arXiv:2208.07339)."""

_CONV1D = {("transformers.pytorch_utils", "Conv1D")}
"""GPT-2's linear, which keeps W as (n, m)."""
_FOUR_BIT = {("bitsandbytes.nn.modules", name) for name in ("Linear4bit", "LinearFP4", "LinearNF4")}
_EIGHT_BIT = {("bitsandbytes.nn.modules", "Linear8bitLt")}
_OUTLIER = 6.0
"""Inputs above it are not rounded to 8 bits where others are, on GPUs (LLM.int8(), section 3.2)."""


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes W x + b and nothing else.

    The exact type is asked for: a subclass may be read by its owner without being called, as
    `nn.MultiheadAttention` does with its output projection, and an update would never run.
    """
    return type(module) is nn.Linear or _kind(module) in _CONV1D | _FOUR_BIT | _EIGHT_BIT


def widths(linear: nn.Module) -> tuple[int, int]:
    """(n, m): input and output width."""
    if _kind(linear) in _CONV1D:
        n, m = _weight(linear).shape
        return n, m
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features  # 4-bit codes lie in a shape of their own


def is_quantized(linear: nn.Module) -> bool:
    """Whether the weight is stored in codes."""
    return _is_four_bit(linear) or _is_eight_bit(linear)


def quantized(linear: nn.Module, codes: Codes, nested: bool) -> nn.Module:
    """A linear of the same widths and bias with W in `codes`; `nested`: 4-bit scales in codes, too.

    Codes are taken of W in float32, so that they are the same whatever precision it comes in.
    """
    bnb, (n, m) = bitsandbytes().nn, widths(linear)
    W, bias = dense_weight(linear).contiguous(), linear.bias
    if codes == "int8":
        coded = bnb.Linear8bitLt(n, m, has_fp16_weights=False, threshold=_OUTLIER, device="meta")
        weight = bnb.Int8Params(W, requires_grad=False)
    else:
        coded = bnb.Linear4bit(n, m, device="meta")
        weight = bnb.Params4bit(W, compress_statistics=nested, quant_type=codes, module=coded)
    coded.weight = weight.to(W.device)  # which is when it is quantised
    coded.bias = bias
    return settled(coded)


def settled(linear: nn.Module) -> nn.Module:
    """The same linear, kept from evaluating another map than it trains; others as they are.

    On CPUs with AVX512-BF16, evaluation repacks 4-bit codes in place, rounds their scales to
    bfloat16, and training after it has no gradient for the input. Evaluation of 8-bit codes rounds
    inputs to 8 bits, training does not.
    """
    if _kind(linear) in _FOUR_BIT:
        linear.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if _kind(linear) in _EIGHT_BIT:
        linear.state = _as_in_training(linear.state)
    return linear


def scale_bytes(linear: nn.Module) -> int:
    """What codes need beside themselves: scales and tables."""
    if _is_four_bit(linear):
        parts = _weight(linear).quant_state.as_dict(packed=True)  # type: ignore[attr-defined]
        return sum(part.nbytes for part in parts.values())
    return 4 * widths(linear)[1] if _is_eight_bit(linear) else 0


def device_of(linear: nn.Module) -> torch.device:
    """Where the weight lies."""
    return _weight(linear).device


def bitsandbytes() -> Any:
    """The package, without its advice to install kernels from the hub."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


@torch.no_grad()
def dense_weight(linear: nn.Module) -> Tensor:
    """W, (m, n), float32 and detached, dequantised where it is stored in codes.

    Not to be written to: over a float32 base it may be the weight itself. Over a quantised one it
    is new at every call and takes 4 bytes a number for as long as it is held.
    """
    weight = _weight(linear)
    if _kind(linear) in _CONV1D:
        return weight.detach().T.float()
    if _is_four_bit(linear):
        return _from_4_bits(weight)
    if _is_eight_bit(linear):
        return _from_8_bits(linear, weight)
    return weight.detach().float()


def _is_four_bit(linear: nn.Module) -> bool:
    kept = _kind(linear) in _FOUR_BIT
    return kept and _weight(linear).quant_state is not None  # type: ignore[attr-defined]


def _is_eight_bit(linear: nn.Module) -> bool:
    return _kind(linear) in _EIGHT_BIT and _weight(linear).dtype == torch.int8


def _as_in_training(state: Any) -> Any:
    """The state of an 8-bit linear that computes in evaluation as it does in training."""
    always = property(lambda _: True, lambda _, given: None)  # each forward sets it
    settled_state = type("MatmulLtState", (type(state),), {"is_training": always})()
    vars(settled_state).update(vars(state))
    return settled_state


def with_weight(linear: nn.Module, W: Tensor) -> nn.Module:
    """A linear of the same kind and bias whose weight is W, (m, n); of codes, an nn.Linear.

    `linear` is changed where it can be, and is not to be used any more.
    """
    if is_quantized(linear):
        bias = linear.bias
        linear = nn.Linear(*widths(linear), bias=False, device="meta")
        if isinstance(bias, Tensor):
            linear.bias = nn.Parameter(bias.detach().float(), requires_grad=False)
    elif _kind(linear) in _CONV1D:
        W = W.T
    linear.weight = nn.Parameter(W.contiguous(), requires_grad=False)
    return linear


def _from_4_bits(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state  # type: ignore[attr-defined]
    assert not getattr(state, "packing_format_for_cpu", False), "repacked: it was not `settled`"
    return dequantize_4bit(weight.data, state).float()


def _from_8_bits(linear: nn.Module, weight: Tensor) -> Tensor:
    """Codes times the largest magnitude of their row over 127."""
    at_rest, in_use = getattr(weight, "SCB", None), linear.state.SCB  # type: ignore[union-attr]
    rows = in_use if at_rest is None else at_rest  # the first forward moves them
    assert isinstance(rows, Tensor)
    return weight.data.float() * (rows.float() / 127.0)[:, None]


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _kind(module: nn.Module) -> tuple[str, str]:
    """The module and the name of the exact type."""
    return type(module).__module__, type(module).__name__

"""The linears that can be wrapped, whatever their storage.

Conv1D and bitsandbytes' linears are known by name: to import their packages costs seconds.
"""

import torch
from torch import Tensor, nn

_CONV1D = {("transformers.pytorch_utils", "Conv1D")}
"""GPT-2's linear, which keeps W as (n, m)."""
_FOUR_BIT = {("bitsandbytes.nn.modules", name) for name in ("Linear4bit", "LinearFP4", "LinearNF4")}
_EIGHT_BIT = {("bitsandbytes.nn.modules", "Linear8bitLt")}


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


def device_of(linear: nn.Module) -> torch.device:
    """Where the weight lies."""
    return _weight(linear).device


@torch.no_grad()
def dense_weight(linear: nn.Module) -> Tensor:
    """W, (m, n), float32 and detached, dequantised where it is stored in codes.

    Not to be written to: over a float32 base it may be the weight itself. Over a quantised one it
    is new at every call and takes 4 bytes a number for as long as it is held.
    """
    weight = _weight(linear)
    if _kind(linear) in _CONV1D:
        return weight.detach().T.float()
    if _kind(linear) in _FOUR_BIT and weight.quant_state is not None:  # type: ignore[attr-defined]
        return _from_4_bits(weight)
    if _kind(linear) in _EIGHT_BIT and weight.dtype == torch.int8:
        return _from_8_bits(linear, weight)
    return weight.detach().float()


def _from_4_bits(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state  # type: ignore[attr-defined]
    # Evaluation on CPUs with AVX512-BF16 repacks the codes, with loss. Whoever loads a 4-bit base
    # must keep it from that by support_avx512bf16_for_cpu = False.
    assert not getattr(state, "packing_format_for_cpu", False), "repacked by bitsandbytes"
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

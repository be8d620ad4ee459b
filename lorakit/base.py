"""The linears that can be wrapped, whatever their storage."""

import torch
from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether `module` computes W x + b and nothing else.

    The exact type is asked for: a subclass may be read by its owner without being called, as
    `nn.MultiheadAttention` does with its output projection, and an update would never run.
    """
    return type(module) is nn.Linear or _is_conv1d(module)


def widths(linear: nn.Module) -> tuple[int, int]:
    """(n, m): input and output width."""
    rows, columns = _weight(linear).shape
    return (rows, columns) if _is_conv1d(linear) else (columns, rows)


def device_of(linear: nn.Module) -> torch.device:
    """Where the weight lies."""
    return _weight(linear).device


def _weight(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, which keeps W as (n, m). By name: importing transformers costs seconds."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"

"""What a run will need, counted from the model before anything is trained."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lorakit.base import is_linear, widths


class Estimate(NamedTuple):
    """Bytes."""

    base: int
    """The frozen weights."""
    trained: int
    """Adapters and head, their gradients and two moments, all float32."""
    activations: int
    """What one forward pass keeps for the backward, at full length: an upper estimate."""

    @property
    def total(self) -> int:
        """The sum; torch and transformers themselves take some 0.6 GB besides."""
        return sum(self)


def estimate(model: nn.Module, rows: int, tokens: int) -> Estimate:
    """Counts weights exactly, activations from the widths of all linears and the attention maps.

    A transformer keeps each linear's input and output (norms, activation functions and residuals
    re-use or equal one of them in size), and for every head the tokens x tokens map twice, before
    and after the softmax's dropout.
    """
    frozen = _bytes(p for p in model.parameters() if not p.requires_grad)
    trained = 4 * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    item = max((p.element_size() for p in model.parameters() if not p.requires_grad), default=4)
    wide = sum(sum(widths(module)) for module in model.modules() if is_linear(module))
    config = getattr(model, "config", None)
    maps = getattr(config, "num_hidden_layers", 0) * getattr(config, "num_attention_heads", 0)
    return Estimate(frozen, trained, item * rows * (tokens * wide + 2 * maps * tokens**2))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)

"""What a run will need, counted from the model before anything is trained."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

from lorakit.base import is_linear, scale_bytes, widths


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


def estimate(model: nn.Module, rows: int, tokens: int, checkpointing: bool = False) -> Estimate:
    """Counts weights exactly, activations from the widths of all linears and the attention maps.

    A transformer keeps each linear's input and output (norms, activation functions and residuals
    re-use or equal one of them in size), and, in plain attention, for every head the tokens x
    tokens map twice, before and after the softmax's dropout. With `checkpointing` it keeps these
    of one block at a time, and what enters each block.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    scales = sum(scale_bytes(module) for module in model.modules() if is_linear(module))
    trained = 4 * sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    item = max((p.element_size() for p in frozen if p.is_floating_point()), default=4)
    config = getattr(model, "config", None)
    blocks, heads = (
        getattr(config, name, 0) for name in ("num_hidden_layers", "num_attention_heads")
    )
    inside = outside = 0
    for name, module in model.named_modules():
        if is_linear(module):
            within = re.search(r"\.\d+\.", name) is not None
            inside += sum(widths(module)) * within
            outside += sum(widths(module)) * (not within)
    maps = 2 * blocks * heads if getattr(config, "_attn_implementation", None) == "eager" else 0
    kept = tokens * inside + maps * tokens**2
    if checkpointing and blocks:
        kept = kept // blocks + blocks * tokens * getattr(config, "hidden_size", 0)
    return Estimate(_bytes(frozen) + scales, trained, item * rows * (kept + tokens * outside))


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)

"""What a base model is known by: another one of the same shapes is told apart, whatever it is
loaded in.

Of every tensor of the base its shape and a digest of a few of its numbers, rounded to bfloat16:
what float32 and bfloat16 loads of the same files agree in. Taken before linears are quantised, and
without modules that start anew. Against accidents, not against people.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from lorakit.errors import FolderError, several

NUMBERS = 64
"""Looked at in each tensor, spread evenly: 4 ms for MiniLM's 103 tensors."""


@dataclass(frozen=True)
class Fingerprint:
    """Of a base as its files have it."""

    stored: str | None
    """What its files store, as their configuration says."""
    commit: str | None
    """Of the hub's repository it came from."""
    tensors: dict[str, str]
    """`384x384 1a2b3c4d`, shape and digest, by name."""


def of(
    model: nn.Module, fresh: Sequence[str], stored: torch.dtype | None, commit: str | None
) -> Fingerprint:
    """Of a model as it was loaded; `fresh` are the modules that its files do not bring."""
    own = {
        name: f"{'x'.join(map(str, p.shape))} {_digest(p)}"
        for name, p in model.named_parameters()
        if not any(name.startswith(f"{module}.") for module in fresh)
    }
    return Fingerprint(str(stored).removeprefix("torch.") if stored else None, commit, own)


def differences(there: Fingerprint, here: Fingerprint) -> list[str]:
    """In what the base `here` is another than the one `there`; empty where it is in nothing.

    A commit tells where to find the other one, and is no difference by itself.
    """
    found = []
    if strange := [*_without(there, here), *_without(here, there)]:
        found.append(f"{len(strange)} tensors are in one of them alone, first {strange[0]}")
    both = [name for name in there.tensors if name in here.tensors]
    resized = [name for name in both if _shape(there, name) != _shape(here, name)]
    if resized:
        first = resized[0]
        shapes = f"{_shape(there, first)} then, {_shape(here, first)} now"
        found.append(f"{len(resized)} tensors have other shapes, first {first}: {shapes}")
    same = [name for name in both if name not in resized]
    if changed := [name for name in same if there.tensors[name] != here.tensors[name]]:
        found.append(f"numbers differ in {len(changed)} of {len(same)} tensors, first {changed[0]}")
    if there.stored and here.stored and there.stored != here.stored:
        found.append(f"its files store {here.stored}, then {there.stored}")
    if found and there.commit and here.commit != there.commit:
        found.append(f"it was of commit {there.commit}")
    return found


def refuse_other(
    origin: Path, there: Fingerprint | None, here: Fingerprint, remedy: str | None
) -> tuple[str, ...]:
    """What is to be said of `here`, where what stands at `origin` was trained over another base.

    Nothing is said where it is not known over which.

    Raises:
        FolderError: instead, with the `remedy`; null is the user's, who wants to go on.

    """
    found = differences(there, here) if there else []
    if not found:
        return ()
    fault = several(f"{origin} was trained over another base model", found)
    if remedy is not None:
        raise FolderError(f"{fault}\n  {remedy}, or go on by --force.")
    return (fault,)


def _digest(p: Tensor) -> str:
    """Of numbers at odd distances: an even one may be a multiple of the rows' length."""
    few = p.detach().reshape(-1)[:: max(1, p.numel() // NUMBERS) | 1][:NUMBERS]
    rounded = few.to("cpu", torch.bfloat16).view(torch.int16)
    return sha256(rounded.numpy().tobytes()).hexdigest()[:8]


def _shape(base: Fingerprint, name: str) -> str:
    return base.tensors[name].partition(" ")[0]


def _without(one: Fingerprint, other: Fingerprint) -> list[str]:
    return [name for name in one.tensors if name not in other.tensors]

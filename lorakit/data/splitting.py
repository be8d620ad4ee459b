"""Which rows are trained on and which are scored: duplicates out, a share held out."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lorakit.data.rows import AnyRows, Rows
from lorakit.errors import DataError

R = TypeVar("R", bound=AnyRows)

Digests = NDArray[np.bytes_]


def without_duplicates(rows: Rows, scored: Rows | None = None) -> tuple[Rows, list[str]]:
    """The first row of every text that is not among the `scored`, and lines that count the others.

    Texts that differ in white space alone are the same: most tokenizers give them the same ids.

    Raises:
        DataError: none is left.

    """
    notes: list[str] = []
    texts = _digests(rows)
    if not len(texts):
        return rows, notes
    _, first, of_row = np.unique(texts, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[of_row] != np.arange(len(texts))).tolist()
    if again:
        other = sum(rows.labels[i] != rows.labels[int(first[of_row[i]])] for i in again)
        note = f"{len(again):,} of {len(texts):,} rows repeat an earlier text and were left out"
        note += f", {other:,} of them with another label" if other else ""
        notes.append(f"{note}: {len(first):,} remain")
    kept = np.sort(first)
    if scored is not None:
        kept = kept[~np.isin(texts[kept], _digests(scored))]
    if leaked := len(first) - len(kept):
        notes.append(f"{leaked:,} training texts are validation texts too and were left out")
    if not len(kept):
        raise DataError("data.train: every text is among the validation texts; none is left.")
    return rows.take(kept), notes


def split(rows: R, share: float, seed: int, labels: Sequence[str] | None = None) -> tuple[R, R]:
    """(train, validation): `share` of the rows, at least one, is held out; with `labels`, a row
    each, of the rows of each label.

    Raises:
        DataError: none would be left to train on, or none of a label.

    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    held, rare = np.zeros(len(rows.places), dtype=bool), []
    for label, members in sorted(_strata(labels or [""] * len(held)).items()):
        order = torch.randperm(len(members), generator=draw).numpy()
        chosen = order[: max(1, round(share * len(members)))]
        held[np.asarray(members)[chosen]] = True
        if len(chosen) == len(members):
            rare.append(label)
    if rare:
        raise DataError(
            f"data.train: too few rows to hold some out of each label: {', '.join(rare)} "
            "would have none left to train on."
            if labels
            else f"data.train: of {len(held):,} rows {share:g} cannot be held out; none would be "
            "left to train on."
        )
    return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))


def _strata(labels: Sequence[str]) -> dict[str, array[int]]:
    """The numbers of the rows of each label."""
    found: dict[str, array[int]] = defaultdict(lambda: array("q"))
    for i, label in enumerate(labels):
        found[label].append(i)
    return found


def _digests(rows: Rows) -> Digests:
    """16 bytes for each text, the same for the same text but for its white space."""
    found = bytearray()
    for text in rows.texts:
        bare = "\0".join(" ".join(part.split()) for part in text)
        found += blake2b(bare.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.frombuffer(found, dtype="S16")

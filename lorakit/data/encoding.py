"""Texts into token ids: chunk by chunk, onto the disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from importlib.metadata import version
from time import perf_counter
from typing import Any

from torch import Tensor

from lorakit.data.batching import Encoded
from lorakit.data.cache import FORMAT, Chunk, Entry, entry
from lorakit.data.rows import Rows, Stored, as_bytes
from lorakit.disk import cache_root
from lorakit.pace import paced

CHUNK = 1_000
"""Rows that the tokenizer gets together; it spreads them over its own threads."""
NAMES = {"train": "training"}
"""What rows of a split are called, where not by its name."""
_SETTINGS = ("pad_token_id", "pad_token_type_id", "truncation_side", "model_input_names")
"""Of a tokenizer, that its file does not hold."""


def encode(
    rows: Rows, targets: Tensor, tokenizer: Any, max_length: int, split: str = "text"
) -> Encoded:
    """Tokenizes every row, cut to `max_length` tokens; of a pair, the longer text is cut first.

    `split` is for messages.
    """

    def chunk(texts: Sequence[tuple[str, ...]]) -> Chunk:
        columns = [list(column) for column in zip(*texts, strict=True)]
        encoded = tokenizer(*columns, truncation="longest_first", max_length=max_length)
        return Chunk(dict(encoded), longer(encoded, columns, tokenizer, max_length))

    found, notes = tokenized([rows.texts], chunk, ["texts", max_length], tokenizer, split)
    return Encoded(found.columns, targets, padding(found.columns, tokenizer), notes)


def tokenized(
    sources: Sequence[Sequence[Any]],
    chunk: Callable[..., Chunk],
    settings: Sequence[Any],
    tokenizer: Any,
    split: str,
) -> tuple[Entry, tuple[str, ...]]:
    """What `chunk` makes of `sources`, some rows at a time; or an earlier run has, and what to say.

    `settings` is all that the ids depend on besides sources and tokenizer; the last is the longest
    length.
    """
    start, own, count = perf_counter(), fingerprint(tokenizer), len(sources[0])
    key = None if own is None else key_of([*settings, own], sources)

    def made() -> Iterator[Chunk]:
        first, *others = map(chunks, sources)
        return map(chunk, paced(first, "rows tokenized", count, len), *others)

    found = entry(key, made)
    rows, notes = f"{count:,} {NAMES.get(split, split)} rows", []
    if found.cut:
        notes.append(f"{found.cut:,} of {rows} are longer than {settings[-1]} tokens and are cut")
    if found.reused:
        notes.append(f"{rows}: tokens reused from {cache_root()} ({perf_counter() - start:.2f} s)")
    return found, tuple(notes)


def padding(columns: Iterable[str], tokenizer: Any) -> dict[str, int]:
    """What each column is filled up with."""
    found = dict.fromkeys(columns, 0)
    found["input_ids"] = tokenizer.pad_token_id
    if "token_type_ids" in found:  # which text of a pair a token is of; not all models take it
        found["token_type_ids"] = tokenizer.pad_token_type_id
    return found


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """`items`, `CHUNK` at a time."""
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]


def longer(
    encoded: Any, columns: Sequence[Any], tokenizer: Any, max_length: int, **settings: Any
) -> int:
    """How many rows were cut. A tokenizer without the answer is asked again, for the longest."""
    if getattr(encoded, "encodings", None):
        return sum(bool(row.overflowing) for row in encoded.encodings)
    full = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) == max_length]
    if not full:
        return 0
    whole = tokenizer(*([column[i] for i in full] for column in columns), **settings)
    return sum(len(ids) > max_length for ids in whole["input_ids"])


def fingerprint(tokenizer: Any) -> str | None:
    """What a tokenizer's ids depend on; None for one written in Python, which cannot be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # the last call's, set anew by the next
    backend.no_padding()
    settings = [getattr(tokenizer, name, None) for name in _SETTINGS]
    versions = [version("tokenizers"), version("transformers")]
    told = json.dumps([type(tokenizer).__name__, settings, versions], default=str)
    return sha256(f"{told}{backend.to_str()}".encode()).hexdigest()


def key_of(settings: Sequence[Any], sources: Sequence[Sequence[Any]]) -> str:
    """A name for these items and settings; another one for all others."""
    digest = sha256(json.dumps([FORMAT, *settings]).encode())
    for source in sources:
        for item in _raw(source):
            digest.update(b"%d:" % len(item))
            digest.update(item)
        digest.update(b"|")
    return digest.hexdigest()


def _raw(items: Sequence[Any]) -> Iterable[bytes]:
    if isinstance(items, Stored):
        return items.raw()
    return map(as_bytes, items)

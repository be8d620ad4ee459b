"""Rows of who says what: read, without duplicates, split, and put into a model's own words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple, Self

import numpy as np

from lorakit.data import DataSection, Source, Splits, sources
from lorakit.data.formats import ASSISTANT, Format, Layout, Turn, Wanted, layout, turns
from lorakit.data.rows import Items, Stored
from lorakit.data.splitting import split
from lorakit.errors import DataError


class Dialogues(NamedTuple):
    """Turns, row by row, in the order of the file."""

    said: Items[tuple[tuple[str, str], ...]]  # who says what, turn by turn
    places: Items[str]  # "train.jsonl line 7"
    format: Format

    def take(self, indices: Iterable[int]) -> Self:
        """The rows at `indices`, in that order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        assert isinstance(self.said, Stored)
        assert isinstance(self.places, Stored)
        return self._replace(said=self.said.take(chosen), places=self.places.take(chosen))


class Span(NamedTuple):
    """A piece of what a model reads, and whether the model is to say it."""

    text: str
    learnt: bool


def read(section: DataSection, wanted: Wanted) -> Splits[Dialogues]:
    """Reads, removes duplicates, splits.

    Raises:
        DataError: files or columns are missing, there are no rows, or a row is none to learn from.

    """
    source, other = sources(section)
    found = _layout(source, wanted)
    train, valid = _read(source, found), None
    notes = [f"rows are read as {found.format}: {', '.join(found.columns)}"]
    origins = source.origin()
    if other is not None:
        valid, origins = _read(other, found), origins | other.origin()
    if section.deduplicate:
        train, said = _without_duplicates(train, valid)
        notes += said
    if valid is None:
        train, valid = split(train, section.held_out, section.split_seed)
    return Splits({"train": train, "validation": valid}, (), tuple(notes), origins)


def layout_of(section: DataSection, wanted: Wanted) -> Layout:
    """Where the turns are in the training rows, from the first of them.

    Raises:
        DataError: as `read` does.

    """
    return _layout(sources(section)[0], wanted)


def _layout(source: Source, wanted: Wanted) -> Layout:
    first = next(source.records(), None)
    if first is None:
        raise DataError(f"{source.where}: {source.name} holds no rows.")
    try:
        return layout(wanted, first)
    except DataError as error:
        raise DataError(f"{source.where}: {error}") from None


def _read(source: Source, found: Layout) -> Dialogues:
    said = Stored[tuple[tuple[str, str], ...]]()
    places = Stored[str]()
    for record in source.records():
        try:
            said.append(tuple((turn.role, turn.text) for turn in turns(record, found)))
        except DataError as error:
            raise DataError(f"{source.where}: {error}") from None
        places.append(record.place)
    if not len(said):
        raise DataError(f"{source.where}: {source.name} holds no rows.")
    return Dialogues(said, places, found.format)


def _without_duplicates(rows: Dialogues, scored: Dialogues | None) -> tuple[Dialogues, list[str]]:
    """The first of equal rows that are not among the `scored`, and lines that count the others."""
    seen = set(_digests(scored)) if scored is not None else set()
    first: dict[bytes, int] = {}
    for i, digest in enumerate(_digests(rows)):
        first.setdefault(digest, i)
    notes, kept = [], [i for digest, i in first.items() if digest not in seen]
    if repeated := len(rows.said) - len(first):
        notes.append(f"{repeated:,} of {len(rows.said):,} rows repeat an earlier one: left out")
    if leaked := len(first) - len(kept):
        notes.append(f"{leaked:,} training rows are validation rows too: left out")
    if not kept:
        raise DataError("data.train: every row is among the validation rows; none is left.")
    return rows.take(kept), notes


def _digests(rows: Dialogues) -> Iterable[bytes]:
    """16 bytes for each row, the same for equal rows alone."""
    for said in rows.said:
        yield blake2b(repr(said).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def spans(said: Sequence[Sequence[str]], form: Format, tokenizer: Any) -> list[Span]:
    """What a model reads of a row; a chat in the words of its tokenizer's template.

    Raises:
        DataError: the tokenizer has no chat template, or its template does not take the row.

    """
    spoken = [Turn(*turn) for turn in said]
    if form == "chat":
        return _chat_spans(spoken, tokenizer)
    return [Span(turn.text, turn.role == ASSISTANT) for turn in spoken]


def _chat_spans(said: Sequence[Turn], tokenizer: Any) -> list[Span]:
    """The template's text, cut where the assistant's words begin and end.

    An earlier answer that the template rewrites once more is said (some drop its reasoning) is
    read, not learnt; so is one that nothing stands before.
    """
    whole = rendered(said, tokenizer)
    found, at = [], 0
    for i, turn in enumerate(said):
        if turn.role != ASSISTANT or i == 0:
            continue
        before = rendered(said[:i], tokenizer, asks=True)
        after = rendered(said[: i + 1], tokenizer)
        if whole.startswith(after) and after.startswith(before) and len(before) >= at:
            found += [Span(whole[at : len(before)], False), Span(after[len(before) :], True)]
            at = len(after)
    if not found or at != len(whole):
        raise DataError(
            "the tokenizer's chat template writes the last answer otherwise than it asks for it; "
            "write prompts and completions (task.format: prompt)."
        )
    return [span for span in found if span.text]


def rendered(said: Sequence[Turn], tokenizer: Any, asks: bool = False) -> str:
    """A chat in the words of the tokenizer's template; `asks`: up to where the assistant speaks.

    Raises:
        DataError: there is no template, or it refuses the chat.

    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template. Write the rows as prompts and completions "
            "or as instructions (task.format: prompt, alpaca), or take a model that has one."
        )
    messages = [{"role": turn.role, "content": turn.text} for turn in said]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks
        )
    except TemplateError as error:
        raise DataError(f"the tokenizer's chat template refuses it: {error}.") from None
    return text

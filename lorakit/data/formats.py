"""How a record says what is asked and what is answered: text, prompts, instructions, chats.

The format is named, or found from the columns, and each record becomes turns: who says what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, Literal, NamedTuple

from lorakit.data.sources import Record
from lorakit.errors import DataError, nearest

Format = Literal["text", "prompt", "alpaca", "chat"]
ASSISTANT = "assistant"
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    ASSISTANT: ASSISTANT,
    "gpt": ASSISTANT,
    "tool": "tool",
}
"""Speakers as `messages` and ShareGPT's `conversations` name them, and what templates call them."""
CHATS = ("messages", "conversations")
PAIRS = (
    ("prompt", "completion"),
    ("source", "target"),
    ("question", "answer"),
    ("input", "output"),
)
"""Columns in which a prompt and its completion are found where the recipe names none."""
TEXT = "text"

_TASK = "Below is an instruction that describes a task"
_WRITE = "Write a response that appropriately completes the request."
ALPACA = f"{_TASK}. {_WRITE}\n\n### Instruction:\n{{instruction}}\n\n### Response:"
ALPACA_INPUT = (
    f"{_TASK}, paired with an input that provides further context. {_WRITE}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""Stanford Alpaca's prompts (Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca), word for
word; the completion follows at once."""


class Turn(NamedTuple):
    """What one speaker says."""

    role: str
    text: str


class Wanted(NamedTuple):
    """What a recipe says of the columns; null: to be found."""

    format: Format | None = None
    template: str | None = None
    """A prompt with {column} in it."""
    prompt: str | None = None
    """Column of the prompt, the text or the chat."""
    completion: str | None = None


class Layout(NamedTuple):
    """Where in a record the turns are."""

    format: Format
    columns: tuple[str, ...]
    """Without which a record is refused."""
    read: Callable[[Record], tuple[Turn, ...]]
    prompt: str | None = None
    """That of the prompt or the text, where a recipe may name it and one alone is asked."""
    completion: str | None = None


def fields(template: str) -> list[str]:
    """The columns that a template names.

    Raises:
        ValueError: it is no template, or names none.

    """
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    if not names or not all(name.isidentifier() for name in names):
        raise ValueError("expected a text with columns in braces, like {question}; {{ is a brace")
    return list(dict.fromkeys(names))


def layout(wanted: Wanted, first: Record) -> Layout:
    """What `wanted` leaves open is found from the first record.

    Raises:
        DataError: no format fits its columns, or one that is named is not there.

    """
    columns = list(map(str, first.cells))
    named = wanted.format or _found(wanted, first)
    if named == "alpaca":
        found = Layout("alpaca", ("instruction", "output"), _alpaca)
    elif named == "chat":
        column = wanted.prompt or _first(CHATS, columns) or CHATS[0]
        found = Layout("chat", (column,), lambda record: _chat(record, column))
    elif named == "text":
        column = wanted.prompt or TEXT
        found = Layout("text", (column,), lambda record: (_said(ASSISTANT, record, column),))
        found = found._replace(prompt=column)
    else:
        found = _prompt_layout(wanted, columns)
    for column in found.columns:
        if column not in columns:
            raise DataError(_no_column(first.place, column, columns))
    return found


def turns(record: Record, found: Layout) -> tuple[Turn, ...]:
    """What a record says.

    Raises:
        DataError: a column is missing or holds nothing, or a chat is none that can be learnt.

    """
    for column in found.columns:
        if column not in record.cells:
            raise DataError(_no_column(record.place, column, list(map(str, record.cells))))
    return found.read(record)


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Alpaca's prompt, with an input where there is one."""
    template = ALPACA_INPUT if given else ALPACA
    return template.format(instruction=instruction, input=given)


def _found(wanted: Wanted, first: Record) -> Format:
    """The format that the columns show, the most special first: an Alpaca row may have a `text`."""
    columns = list(map(str, first.cells))
    if wanted.template or wanted.completion:
        return "prompt"
    if wanted.prompt is not None:
        return "chat" if isinstance(first.cells.get(wanted.prompt), list) else "text"
    if _first(CHATS, columns):
        return "chat"
    if {"instruction", "output"} <= set(columns):
        return "alpaca"
    if any(set(pair) <= set(columns) for pair in PAIRS):
        return "prompt"
    if TEXT in columns:
        return "text"
    pairs = ", ".join(f"{prompt} and {completion}" for prompt, completion in PAIRS)
    raise DataError(
        f"{first.place}: no format fits the columns {', '.join(columns) or 'none'}. Known: "
        f"{' or '.join(CHATS)}; instruction and output; {pairs}; {TEXT}. Name them: data.text is "
        "the prompt's or the text's, data.label the completion's."
    )


def _prompt_layout(wanted: Wanted, columns: Sequence[str]) -> Layout:
    """Of a prompt, or of a template of several columns, and its completion."""
    prompts = [prompt for prompt, _ in PAIRS]
    fitting = [pair for pair in PAIRS if set(pair) <= set(columns)]
    prompt, completion = fitting[0] if fitting else (_first(prompts, columns) or prompts[0], None)
    completion = completion or _first([answer for _, answer in PAIRS], columns) or PAIRS[0][1]
    prompt, completion = wanted.prompt or prompt, wanted.completion or completion
    asked = fields(wanted.template) if wanted.template else [prompt]

    def read(record: Record) -> tuple[Turn, ...]:
        if wanted.template is None:
            question = _said("user", record, prompt)
        else:
            cells = {name: _text(record, name) for name in asked}
            question = Turn("user", wanted.template.format(**cells))
        return question, _said(ASSISTANT, record, completion)

    named = prompt if wanted.template is None else None
    return Layout("prompt", (*asked, completion), read, named, completion)


def _alpaca(record: Record) -> tuple[Turn, ...]:
    instruction = _said("user", record, "instruction").text
    given = _text(record, "input") if record.cells.get("input") else ""
    return Turn("user", alpaca_prompt(instruction, given)), _said(ASSISTANT, record, "output")


def _chat(record: Record, column: str) -> tuple[Turn, ...]:
    """Messages with `role` and `content`, or `from` and `value` as ShareGPT has them."""
    messages = record.cells[column]
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not len(messages):
        raise DataError(f"{record.place}: {column!r}: expected a list of messages, not empty.")
    said = tuple(_message(record, column, i, given) for i, given in enumerate(messages, start=1))
    if said[-1].role != ASSISTANT:
        raise DataError(
            f"{record.place}: the chat ends with the {said[-1].role}; expected the {ASSISTANT}, "
            "whose words are what is learnt."
        )
    if len(said) == 1:
        raise DataError(f"{record.place}: the {ASSISTANT} alone speaks; nobody asks.")
    return said


def _message(record: Record, column: str, number: int, given: Any) -> Turn:
    where = f"{record.place}: {column} {number}"
    keys = given if isinstance(given, Mapping) else {}
    role = keys.get("role", keys.get("from"))
    text = keys.get("content", keys.get("value"))
    if role is None or ("content" not in keys and "value" not in keys):
        raise DataError(f"{where}: expected `role` and `content`, or `from` and `value`.")
    if role not in ROLES:
        known = ", ".join(ROLES)
        raise DataError(f"{where}: no role {role!r}.{nearest(str(role), ROLES)} Known: {known}.")
    if not isinstance(text, str):
        raise DataError(f"{where}: its content is a {type(text).__name__}; only text is learnt.")
    if ROLES[role] == ASSISTANT and not text.strip():
        raise DataError(f"{where}: the {ASSISTANT} says nothing; there is nothing to learn.")
    return Turn(ROLES[role], text)


def _said(role: str, record: Record, column: str) -> Turn:
    """Raises DataError for a cell with nothing in it."""
    text = _text(record, column)
    if not text.strip():
        raise DataError(f"{record.place}: no value in column {column!r}.")
    return Turn(role, text)


def _text(record: Record, column: str) -> str:
    value = record.cells[column]
    if isinstance(value, dict | list):
        kind = type(value).__name__
        raise DataError(f"{record.place}: {column!r} holds a {kind}, no text.")
    return "" if value is None else str(value)


def _first(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _no_column(place: str, column: str, columns: Sequence[str]) -> str:
    known = ", ".join(columns) or "none"
    return f"{place}: no column {column!r}.{nearest(column, columns)} Columns: {known}."

"""Texts that a model writes, greedily: after one prompt, or after many at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.data.dialogues import rendered
from lorakit.data.formats import Turn, alpaca_prompt, fields
from lorakit.errors import DataError, LorakitError

if TYPE_CHECKING:
    from lorakit.data import DataSection
    from lorakit.tasks import TaskSection


def prompt_of(text: str, section: TaskSection, tokenizer: Any) -> str:
    """A user's bare text as the rows of `section.format` prompt it.

    Raises:
        LorakitError: the format is still to be found from rows; a template asks for more than one
            text; or the tokenizer has no chat template.

    """
    if section.template is not None:
        asked = fields(section.template)
        if len(asked) > 1:
            raise LorakitError(
                f"task.template asks for {', '.join(asked)}; one text cannot say them all."
            )
        return section.template.format(**{asked[0]: text})
    match section.format:
        case "auto":
            raise LorakitError("task.format: auto: name the format that the rows had.")
        case "alpaca":
            return alpaca_prompt(text)
        case "chat":
            return rendered([Turn("user", text)], tokenizer, asks=True)
        case "text" | "prompt":
            return text


def column_of(section: TaskSection, data: DataSection) -> str | None:
    """The column that the rows had what `prompt_of` takes in; null: it is none's whole content."""
    if section.template is not None:
        asked = fields(section.template)
        return asked[0] if len(asked) == 1 else None
    one = isinstance(data.text, str) and section.format in ("text", "prompt")
    return str(data.text) if one else None


def complete(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch_size: int
) -> Iterator[str]:
    """What `model` writes after each prompt, in their order, special tokens left out.

    Greedy; at most `max_new_tokens`, as far as the model has positions for them.

    Raises:
        DataError: a prompt is so long that no position is left to write at.

    """
    waiting = iter(prompts)
    while texts := list(islice(waiting, batch_size)):
        if _writes_apart(model):
            ids = tokenizer(texts)["input_ids"]
        else:
            opening = begins(tokenizer)
            bare = tokenizer(texts, add_special_tokens=False)["input_ids"]
            ids = [[*opening(text), *tokens] for text, tokens in zip(texts, bare, strict=True)]
        yield from continued(model, tokenizer, ids, max_new_tokens)


@torch.no_grad()
def continued(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """What `model` writes after each prompt of a batch, given as token ids."""
    inner, apart = unwrapped(model), _writes_apart(model)
    longest = max(map(len, prompts))
    room = max_new_tokens if apart else min(max_new_tokens, _positions(inner) - longest)
    if room < 1:
        raise DataError(
            f"a prompt has {longest:,} tokens and the model {_positions(inner):,} positions; "
            "none is left to write at."
        )
    device = next(inner.parameters()).device
    pad = tokenizer.pad_token_id
    rows = [_padded(prompt, longest, pad, left=not apart) for prompt in prompts]
    masks = [_padded([1] * len(prompt), longest, 0, left=not apart) for prompt in prompts]
    written = inner.generate(
        input_ids=torch.tensor(rows, device=device),
        attention_mask=torch.tensor(masks, device=device),
        max_new_tokens=room,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=pad,
        eos_token_id=_ends(inner, tokenizer),
    )
    answers = written if apart else written[:, longest:]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return texts


def begins(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function of a text: the token that the tokenizer begins it with, unless it stands there.

    So a chat whose template writes the token has it once, as all other texts.
    """
    bos = tokenizer.bos_token_id
    adds = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return lambda text: [bos] if adds and not text.startswith(tokenizer.bos_token) else []


def unwrapped(model: nn.Module) -> Any:
    """The model within what data-parallel training wraps around it."""
    return getattr(model, "module", model)


def exact_match(truth: str, guess: str) -> float:
    """1 where two texts are the same but for white space at their ends, else 0."""
    return float(truth.strip() == guess.strip())


def rouge_l(truth: str, guess: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, in lower case, unstemmed.

    From 0 to 1; words are runs of letters and digits.
    """
    one, other = _words(truth), _words(guess)
    common = _common(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row of its table."""
    row = [0] * (len(other) + 1)
    for word in one:
        above = row
        row = [0]
        for j, known in enumerate(other):
            row.append(above[j] + 1 if word == known else max(above[j + 1], row[j]))
    return row[-1]


def _writes_apart(model: nn.Module) -> bool:
    """Whether the answer is a sequence of its own, not the prompt's continuation."""
    return bool(unwrapped(model).config.is_encoder_decoder)


def _positions(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The ids that end an answer: the model's own, and the one that answers are learnt with."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else [own] if isinstance(own, int) else list(own)
    return list(dict.fromkeys([*own, tokenizer.eos_token_id]))


def _padded(ids: Sequence[int], size: int, value: int, left: bool) -> list[int]:
    fill = [value] * (size - len(ids))
    return [*fill, *ids] if left else [*ids, *fill]


def scores(truths: Sequence[str], guesses: Sequence[str]) -> Tensor:
    """(rows, 2): exact match and ROUGE-L of each guess."""
    pairs = zip(truths, guesses, strict=True)
    return torch.tensor([[exact_match(t, g), rouge_l(t, g)] for t, g in pairs])

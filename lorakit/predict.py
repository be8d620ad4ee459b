"""What a finished adapter answers to texts: labels, numbers, tags, or text of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from lorakit.data.batching import Encoded
from lorakit.data.encoding import longer, padding
from lorakit.engine import Engine
from lorakit.errors import DataError, LorakitError
from lorakit.inputs import Asked, Input
from lorakit.models.heads import CLASSIFIER, WRITERS, Head
from lorakit.tasks import TaskSection, glue
from lorakit.tasks.generation import column_of, complete, prompt_of
from lorakit.trained import Trained, logits

WINDOW = 8
"""Batches that are read ahead and sorted by length, so that little is padded; then the answers go
out in the order of the texts, and memory does not grow with their number."""
LIKELY = 0.5
"""From this probability on a text has a label, where it may have any number of them."""
NEW_TOKENS = 128
"""How many a model writes where nothing is said."""
PLACES = 6
"""Decimals of probabilities and numbers."""
FORMATS = get_args(TaskSection.model_fields["format"].annotation)[1:]
"""How a bare text may be prompted; the first, `auto`, is of rows."""
BARE = TaskSection(name="causal-lm", format="text")
"""How, where no recipe tells."""


class Answer(NamedTuple):
    """What the model says of one input."""

    prediction: Any
    """A label, a list of labels or tags, a number, or a text."""
    probabilities: dict[str, float] = {}  # noqa: RUF012
    """Of every label; empty where answers are no labels, or one for each word."""

    def cells(self) -> dict[str, Any]:
        """The answer as columns: `prediction`, its `probability`, then those of all labels."""
        found = {"prediction": self.prediction}
        if not self.probabilities:
            return found
        if isinstance(self.prediction, str):
            found["probability"] = self.probabilities[self.prediction]
        return found | {"probabilities": self.probabilities}


class Settings(NamedTuple):
    """How to answer."""

    batch_size: int = 32
    max_length: int | None = None
    """Tokens, beyond which a text to be labelled is cut; null: as in training."""
    max_new_tokens: int | None = None
    """Of a text that the model writes; null: `NEW_TOKENS`."""
    format: str | None = None
    """How a bare text becomes a prompt; null: as in training."""

    def refuse_unheard(self, writes: bool) -> None:
        """Raises LorakitError for what says nothing to a model that writes, or that labels."""
        of_labels = {"--max-length": self.max_length}
        of_words = {"--format": self.format, "--max-new-tokens": self.max_new_tokens}
        unheard = of_labels if writes else of_words
        if given := [option for option, value in unheard.items() if value is not None]:
            other, this = ("label", "writes") if writes else ("write", "labels")
            raise LorakitError(f"{', '.join(given)}: goes with models that {other}; this {this}.")


@dataclass
class Counts:
    """What was met on the way."""

    read: int = 0
    empty: int = 0
    cut: int = 0

    def notes(self) -> tuple[str, ...]:
        """What was done to the texts, to be said aloud."""
        said = [] if self.read else ["there was no text to answer"]
        if self.empty:
            said.append(f"{self.empty:,} of {self.read:,} inputs are empty and were left out")
        if self.cut:
            said.append(
                f"{self.cut:,} of {self.read - self.empty:,} texts are longer than the model was "
                "asked to read and were cut: --max-length"
            )
        return tuple(said)


def reading(trained: Trained, columns: tuple[str, ...] | None) -> Asked:
    """How inputs are to be read for this model, as far as its recipe tells."""
    recipe, words = trained.recipe, trained.head.kind == "TOKEN_CLS"
    writes = trained.head.kind in WRITERS
    if recipe is not None and recipe.task.name in glue.TASKS:
        return Asked(columns, len(glue.TASKS[recipe.task.name].hub))
    if recipe is None or recipe.data is None:
        return Asked(columns, 1 if writes else None, words)
    named = column_of(recipe.task, recipe.data) if writes else recipe.data.text
    if named is None:
        return Asked(columns, 1 if writes else None, words)
    names = (named,) if isinstance(named, str) else named
    return Asked(columns or names, len(names), words)


def answers(
    trained: Trained, inputs: Iterable[Input], settings: Settings, counts: Counts
) -> Iterator[tuple[Input, Answer]]:
    """Each input that is not empty, and what the model says of it, in order; `counts` are kept.

    Raises:
        LorakitError: the model has a head of another kind; or a text cannot be asked as it is.

    """
    if trained.head.kind not in READERS:
        known = ", ".join(READERS)
        raise LorakitError(
            f"{trained.path} has a head of kind {trained.head.kind}; expected one of {known}."
        )
    settings.refuse_unheard(trained.head.kind in WRITERS)
    engine = Engine()
    model = engine.prepare(trained.model).eval()
    read = READERS[trained.head.kind](Asking(trained, model, engine.device, settings, counts))
    stream = _present(inputs, counts)
    while window := list(islice(stream, WINDOW * settings.batch_size)):
        yield from zip(window, read(window), strict=True)


def row(given: Input, answer: Answer) -> dict[str, Any]:
    """What is shown of the two.

    Raises:
        DataError: a column of the input is called as one of the answer's is.

    """
    said = answer.cells()
    if taken := sorted(given.cells.keys() & said.keys()):
        raise DataError(
            f"{given.place}: there is a column {taken[0]!r} already, where the answer would stand; "
            "rename it."
        )
    return {**given.cells, **said}


def _present(inputs: Iterable[Input], counts: Counts) -> Iterator[Input]:
    for given in inputs:
        counts.read += 1
        if given.texts:
            yield given
        else:
            counts.empty += 1


class Asking(NamedTuple):
    """All that a reader needs."""

    trained: Trained
    model: nn.Module
    device: torch.device
    settings: Settings
    counts: Counts

    @property
    def head(self) -> Head:
        """The model's, its labels from its own configuration where the adapter names none."""
        head, config = self.trained.head, cast(Any, self.trained.model.config)
        return head if head.labels else head._replace(labels=tuple(config.id2label.values()))

    def max_length(self, texts: int = 1) -> int:
        """Tokens, beyond which `texts` that are read together are cut.

        Raises:
            LorakitError: the tokenizer's own take all of them, or the model has no position left.

        """
        recipe, most = self.trained.recipe, self.trained.max_tokens
        section = recipe.task if recipe else TaskSection(name="classification")
        length = self.settings.max_length or min(section.max_length, most)
        least = self.trained.tokenizer.num_special_tokens_to_add(pair=texts == 2) + texts
        if not least <= length <= most:
            raise LorakitError(f"--max-length: {length}: expected {least} to {most:,} tokens.")
        return length


Window = Sequence[Input]
Reader = Callable[[Window], Iterator[Answer]]


def _classified(asking: Asking) -> Reader:
    """One answer a text, or a pair of texts."""
    head, tokenizer = asking.head, asking.trained.tokenizer
    say = SAYERS[head.problem]

    def read(window: Window) -> Iterator[Answer]:
        columns = [list(column) for column in zip(*(i.texts for i in window), strict=True)]
        length = asking.max_length(len(columns))
        encoded = tokenizer(*columns, truncation="longest_first", max_length=length)
        asking.counts.cut += longer(encoded, columns, tokenizer, length)
        yield from (say(row, head.labels) for row in _outputs(asking, dict(encoded)))

    return read


def _tagged(asking: Asking) -> Reader:
    """A tag for every word: what the model says of its first token; none where it was cut off."""
    labels, tokenizer = asking.head.labels, asking.trained.tokenizer

    def read(window: Window) -> Iterator[Answer]:
        encoded = tokenizer(
            [list(given.texts) for given in window],
            is_split_into_words=True,
            truncation=True,
            max_length=asking.max_length(),
        )
        found = _outputs(asking, dict(encoded))
        for number, (given, row) in enumerate(zip(window, found, strict=True)):
            words = encoded.word_ids(number)
            first = [words.index(i) for i in range(len(given.texts)) if i in words]
            asking.counts.cut += len(first) < len(given.texts)
            yield Answer([labels[guess] for guess in row[first].argmax(dim=-1).tolist()])

    return read


def _written(asking: Asking) -> Reader:
    """The text that the model goes on with."""
    trained, settings = asking.trained, asking.settings
    section = trained.recipe.task if trained.recipe else BARE
    if settings.format is not None:
        section = section.model_copy(update={"format": settings.format, "template": None})
    if section.format == "auto" and section.template is None:
        raise LorakitError(
            "the recipe leaves task.format to the rows; say by --format how a bare text is to be "
            f"prompted: {', '.join(FORMATS)}."
        )

    def read(window: Window) -> Iterator[Answer]:
        prompts = [prompt_of(given.texts[0], section, trained.tokenizer) for given in window]
        yield from map(
            Answer,
            complete(
                asking.model,
                trained.tokenizer,
                prompts,
                settings.max_new_tokens or NEW_TOKENS,
                settings.batch_size,
            ),
        )

    return read


def _outputs(asking: Asking, columns: dict[str, list[list[int]]]) -> list[Tensor]:
    """What the model says of each row, in their order; like lengths are asked together."""
    count, size = len(columns["input_ids"]), asking.settings.batch_size
    rows = Encoded(columns, torch.empty(0), padding(columns, asking.trained.tokenizer))
    order = rows.lengths.argsort(descending=True).tolist()
    found: dict[int, Tensor] = {}
    for i in range(0, count, size):
        batch = rows.batch(order[i : i + size]).to(asking.device)
        found.update(zip(batch.rows, logits(asking.model, batch.inputs).cpu(), strict=True))
    return [found[number] for number in range(count)]


def _one_label(row: Tensor, labels: Sequence[str]) -> Answer:
    return Answer(labels[int(row.argmax())], _shares(row.softmax(dim=-1), labels))


def _several_labels(row: Tensor, labels: Sequence[str]) -> Answer:
    shares = row.sigmoid()
    likely = [label for label, share in zip(labels, shares, strict=True) if share > LIKELY]
    return Answer(likely, _shares(shares, labels))


def _number(row: Tensor, labels: Sequence[str]) -> Answer:
    return Answer(round(float(row.squeeze()), PLACES))


def _shares(row: Tensor, labels: Sequence[str]) -> dict[str, float]:
    return {label: round(float(p), PLACES) for label, p in zip(labels, row, strict=True)}


SAYERS = {
    "single_label_classification": _one_label,
    "multi_label_classification": _several_labels,
    "regression": _number,
}
"""What outputs mean, by what transformers calls the problem."""
READERS = {CLASSIFIER: _classified, "TOKEN_CLS": _tagged, **dict.fromkeys(WRITERS, _written)}
"""How a window of inputs is answered, by PEFT's word for the head."""

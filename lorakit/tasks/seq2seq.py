"""An encoder that reads and a decoder that answers, such as T5: the loss of each answer's token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorakit.data.batching import Encoded
from lorakit.data.cache import Chunk
from lorakit.data.dialogues import Dialogues
from lorakit.data.encoding import NAMES, longer, padding, tokenized
from lorakit.models.heads import Head
from lorakit.tasks.generation import unwrapped
from lorakit.tasks.language import MASK, LanguageTask
from lorakit.tasks.words import word_losses


@dataclass(frozen=True)
class Seq2SeqTask(LanguageTask):
    """Fits `tasks.Task`; prompts and answers are each cut to `max_length` tokens."""

    def head(self) -> Head:
        return Head(kind="SEQ_2_SEQ_LM")

    def encode(self, split: str, rows: Dialogues) -> Encoded:
        tokenizer, size = self.tokenizer, self.max_length

        def prompts(said: Sequence[Sequence[Sequence[str]]]) -> Chunk:
            texts = [prompt for (_, prompt), _ in said]
            encoded = tokenizer(texts, truncation=True, max_length=size)
            return Chunk(dict(encoded), longer(encoded, [texts], tokenizer, size))

        read, notes = tokenized([rows.said], prompts, ["prompts", size], tokenizer, split)
        settings = ["answers", tokenizer.eos_token, size]
        answered, _ = tokenized([rows.said], self._answers, settings, tokenizer, split)
        if answered.cut:
            share = f"{answered.cut:,} of {len(rows.said):,} {NAMES.get(split, split)} rows"
            notes += (f"{share} have an answer of more than {size} tokens, which is cut",)
        labels = answered.columns["labels"]
        fill = {**padding(read.columns, tokenizer), "labels": MASK}
        lengths = torch.as_tensor(labels.lengths)
        return Encoded({**read.columns, "labels": labels}, lengths, fill, notes)

    def _answers(self, said: Sequence[Sequence[Sequence[str]]]) -> Chunk:
        """Each ends with the end-of-sequence token, unless it is cut."""
        texts, eos = [answer for _, (_, answer) in said], self.tokenizer.eos_token_id
        labels = [
            ids if ids[-1:] == [eos] else [*ids, eos]
            for ids in self.tokenizer(text_target=texts)["input_ids"]
        ]
        cut = sum(len(ids) > self.max_length for ids in labels)
        return Chunk({"labels": [ids[: self.max_length] for ids in labels]}, cut)

    def token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = inputs["labels"]
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=unwrapped(model).prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        ).logits
        asked = labels != MASK
        losses = word_losses(logits[asked], labels[asked])
        return losses, asked.nonzero()[:, 0]

    def asked(self, inputs: dict[str, Tensor]) -> tuple[list[list[int]], list[str]]:
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        rows = inputs["input_ids"].tolist()
        prompts = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        answers = [[i for i in row if i != MASK] for row in inputs["labels"].tolist()]
        return prompts, self.tokenizer.batch_decode(answers, skip_special_tokens=True)

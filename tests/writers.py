"""Tiny models that write text, with random weights, and a tokenizer trained on a few words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

EOS, PAD, BOS = "<|end|>", "<|pad|>", "<|begin|>"
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""A chat template whose turns can be told apart."""
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
WORDS = (
    "what is the capital of france paris name a colour blue write a poem about rain it falls and "
    "falls on the roof of an old house number one two three four five six seven eight nine ten"
)


def tokenizer(pad: bool = True, bos: bool = False, chat: str | None = None) -> Any:
    """Byte-level BPE of some 400 tokens; `bos`: every text begins with a token of its own."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, PAD, BOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator([WORDS], trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 2)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=EOS,
        pad_token=PAD if pad else None,
        bos_token=BOS if bos else None,
        model_max_length=256,
    )
    made.chat_template = chat
    return made


def llama(folder: Path, **settings: Any) -> Path:
    """A Llama of 2 blocks, 32 wide, with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=400,
        max_position_embeddings=256,
        eos_token_id=0,
        initializer_range=0.2,
        **SIZES,
        **heads,
    )
    return _saved(LlamaForCausalLM, config, folder, **settings)


def gpt2(folder: Path, **settings: Any) -> Path:
    """A GPT-2 of 2 blocks, 32 wide; its positions are learnt."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=400,
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return _saved(GPT2LMHeadModel, config, folder, **settings)


def t5(folder: Path, **settings: Any) -> Path:
    """A T5 of 2 blocks on each side, 32 wide."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=400,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=2.0,
        decoder_start_token_id=1,
        pad_token_id=1,
        eos_token_id=0,
    )
    return _saved(T5ForConditionalGeneration, config, folder, **settings)


def gguf_file(path: Path) -> Path:
    """A Llama of one block and a vocabulary of bytes, as llama.cpp stores it, in 8-bit blocks."""
    import gguf
    import numpy
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), "ab", "<end>"]
    writer = gguf.GGUFWriter(path, "llama")
    for name, number in {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "head_count": 2,
        "head_count_kv": 1,
        "rope_dimension_count": 16,
        "vocab_size": len(tokens),
        "eos_token_id": len(tokens) - 1,
    }.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    attention = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    gated = {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    norms = {"attn_norm": (32,), "ffn_norm": (32,)}
    shapes = {f"blk.0.{name}": s for name, s in (attention | gated | norms).items()}
    draw, blocks = numpy.random.default_rng(0), gguf.GGMLQuantizationType.Q8_0
    for name, shape in {**shapes, "token_embd": (len(tokens), 32), "output_norm": (32,)}.items():
        values = draw.standard_normal(shape).astype(numpy.float32)
        if len(shape) == 2 and name != "token_embd":
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, blocks), raw_dtype=blocks)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _saved(kind: Any, config: Any, folder: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer(**settings).save_pretrained(folder)
    return folder


def rows(count: int = 24) -> Sequence[dict[str, str]]:
    """Prompts and completions of unequal length, all different."""
    return [
        {
            "prompt": f"name the number {'very ' * (i % 5)}{i}: ",
            "completion": f"it is {i}{' and falls' * (i % 4)}",
        }
        for i in range(count)
    ]

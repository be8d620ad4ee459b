"""Bases stored in codes: loaded, trained on, evaluated, and loaded again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import MINILM
from test_models import load
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import models
from lorakit.base import dense_weight, is_linear, is_quantized, quantized, settled
from lorakit.errors import ModelError, RecipeError
from lorakit.prepare import prepare
from lorakit.recipe import load as read
from lorakit.trained import logits, open_trained

CODES = ("nf4", "fp4", "int8")
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "olora": {},
    "sora": {"sparsity": {"xi": 0.05, "gate_init": "normal"}},
    "blora": {},
    "adalora": {"budget": {"target": 2, "warmup": 0, "final": 1, "interval": 1}},
}


def rewritten(recipe: Path, **sections: dict[str, Any]) -> Path:
    given = yaml.safe_load(recipe.read_text())
    for name, changes in sections.items():
        given[name] |= changes
    recipe.write_text(yaml.safe_dump(given, sort_keys=False))
    return recipe


def gradient(model: nn.Module, into: nn.Module) -> Tensor:
    """Of the sum of squared logits, by what `into` gives; the base's own dropout is off."""
    given: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[0]

    hook = into.register_forward_hook(keep)
    model(**models.probe(model)).logits.square().sum().backward()
    hook.remove()
    assert given[0].grad is not None
    return given[0].grad


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_in_the_middle_of_training_changes_nothing(
    tiny: Path, codes: str, precision: str
) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes 0.50 left alone loses the gradient of the input."""
    model = load(tiny, quantize=codes, dropout=0.0, precision=precision).model
    rows, words = models.probe(model), model.bert.embeddings
    before, trained = gradient(model.train(), words), logits(model, rows)
    evaluated = logits(model.eval(), rows), logits(model, rows)
    assert torch.equal(*evaluated)
    assert torch.equal(evaluated[0], trained)
    assert before.abs().max() > 0
    assert torch.equal(gradient(model.train(), words), before)


@pytest.mark.parametrize("codes", CODES)
def test_all_linears_are_stored_in_codes_but_the_head(tiny: Path, codes: str) -> None:
    base = load(tiny, quantize=codes)
    linears = {name for name, module in base.model.named_modules() if is_linear(module)}
    coded = {name for name, module in base.model.named_modules() if is_quantized(module)}
    assert coded == linears - {"classifier"}
    assert base.head == ("classifier",)


@pytest.mark.parametrize("codes", CODES)
def test_codes_are_the_same_in_every_precision_and_at_every_load(tiny: Path, codes: str) -> None:
    """They are taken of the weights as stored, not as `precision` rounds them."""
    one, again, other = (
        load(tiny, quantize=codes, precision=p).model for p in ("fp32", "fp32", "bf16")
    )
    rows = models.probe(one)
    assert torch.equal(logits(one.eval(), rows), logits(again.eval(), rows))
    for name, module in one.named_modules():
        if is_quantized(module):
            there = other.get_submodule(name)
            assert torch.equal(dense_weight(there), dense_weight(module))
    assert other.classifier.weight.dtype == torch.bfloat16
    assert other.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("codes", "double"), [("nf4", False), ("nf4", True), ("int8", False)])
def test_it_answers_as_transformers_own_quantised_model(
    tiny: Path, codes: str, double: bool
) -> None:
    ours = load(tiny, quantize=codes, double_quant=double).model.train(False)
    theirs = on_codes(tiny, codes, double, num_labels=3)
    theirs.classifier.load_state_dict(ours.classifier.state_dict())
    rows = models.probe(ours)
    assert_close(logits(theirs, rows), logits(ours, rows), rtol=0, atol=1e-5)


def on_codes(path: Path, codes: str, double: bool = False, **settings: Any) -> Any:
    """A base as transformers quantises it, kept from repacking or rounding in evaluation."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=codes != "int8",
        load_in_8bit=codes == "int8",
        bnb_4bit_quant_type="nf4" if codes == "int8" else codes,
        bnb_4bit_use_double_quant=double,
        llm_int8_skip_modules=["classifier"],  # transformers would store a fresh one in codes
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        path,
        quantization_config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        **settings,
    )
    for module in model.modules():
        settled(module)
    return model.eval()


def test_conv1d_is_stored_the_other_way_round() -> None:
    from transformers.pytorch_utils import Conv1D

    linear = Conv1D(96, 64)
    x = torch.randn(3, 64)
    assert_close(quantized(linear, "int8", nested=False)(x), linear(x), rtol=0, atol=0.01)


def test_minilm_in_four_bits_still_means_the_same(tmp_path: Path) -> None:
    whole, coded = load(MINILM).model.eval(), load(MINILM, quantize="nf4").model.eval()
    rows = models.probe(whole)
    with torch.no_grad():
        ours, theirs = whole.bert(**rows)[0], coded.bert(**rows)[0]
    likeness = torch.cosine_similarity(ours, theirs, dim=-1)
    assert 0.9 < float(likeness.mean()) < 0.9999


def test_scales_can_only_be_coded_where_there_are_scales_of_four_bit_codes() -> None:
    for quantize in (None, "int8"):
        with pytest.raises(ValueError, match="only 4-bit codes have scales"):
            models.ModelSection(name="m", quantize=quantize, double_quant=True)


def test_a_base_that_is_stored_in_codes_already_is_not_coded_again(
    tiny: Path, tmp_path: Path
) -> None:
    on_codes(tiny, "nf4", num_labels=3).save_pretrained(tmp_path / "coded")
    for file in tiny.glob("tokenizer*"):
        (tmp_path / "coded" / file.name).write_bytes(file.read_bytes())
    base = load(tmp_path / "coded")
    assert is_quantized(base.model.bert.encoder.layer[0].output.dense)
    before = gradient(base.model, base.model.bert.embeddings)
    logits(base.model.eval(), models.probe(base.model))
    after = gradient(base.model.train(False), base.model.bert.embeddings)
    assert torch.equal(after, before)
    with pytest.raises(ModelError, match=r"model.quantize: nf4: .*stored in codes already"):
        load(tmp_path / "coded", quantize="nf4")


@pytest.mark.parametrize("variant", VARIANTS)
def test_trained_and_pruned_on_codes_peft_loads_it_on_the_same_codes(
    recipe: Path, lorakit: Callable[..., Any], tiny: Path, variant: str
) -> None:
    adapter = {"variant": variant, "alpha": 16, **VARIANTS[variant]}
    train = {"steps": 3, "lr": 0.02, "save_every": None}
    rewritten(recipe, model={"quantize": "nf4"}, adapter=adapter, train=train)
    trained = lorakit("train", recipe)
    assert trained.code == 0, trained.err
    run = Path("runs/tiny")
    one, again = open_trained(run).model, open_trained(run).model
    rows = models.probe(one)
    said = logits(one, rows)
    assert torch.equal(logits(again, rows), said)
    pruned = lorakit("prune", run)
    assert pruned.code == 0, pruned.err
    assert_close(logits(open_trained(run / "pruned").model, rows), said, rtol=0, atol=1e-5)
    theirs = peft.PeftModel.from_pretrained(on_codes(tiny, "nf4", num_labels=2), run / "pruned")
    assert_close(logits(theirs.eval(), rows), said, rtol=0, atol=1e-5)
    with theirs.disable_adapter():
        assert (logits(theirs, rows) - said).abs().max() > 1e-3


def test_merged_it_stands_on_the_dequantised_weights(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    rewritten(recipe, model={"quantize": "nf4"}, train={"steps": 2, "save_every": None})
    assert lorakit("train", recipe).code == 0
    run = Path("runs/tiny")
    answer = lorakit("merge", run)
    assert answer.code == 0, answer.err
    ours = open_trained(run).model
    alone = transformers.AutoModelForSequenceClassification.from_pretrained(run / "merged")
    assert not any(map(is_quantized, alone.modules()))
    rows = models.probe(ours)
    assert_close(logits(alone.eval(), rows), logits(ours, rows), rtol=0, atol=1e-5)


def test_olora_starts_at_the_codes_or_at_the_weights_of_a_source(recipe: Path, tiny: Path) -> None:
    started = {}
    for source in (None, str(tiny)):
        rewritten(recipe, model={"quantize": "nf4"}, adapter={"variant": "olora", "source": source})
        started[source] = prepare(read(recipe)).layers
    plain = load(tiny).model
    for name, layer in started[str(tiny)].items():
        W = plain.get_submodule(name).weight
        Q = layer.B0
        assert_close(Q @ layer.A0, Q @ (Q.T @ W), rtol=0, atol=1e-5)
        of_codes = started[None][name]
        W = dense_weight(of_codes.base)
        Q = of_codes.B0
        assert_close(Q @ of_codes.A0, Q @ (Q.T @ W), rtol=0, atol=1e-5)
        assert not torch.allclose(layer.A0, of_codes.A0, atol=1e-4)
        assert torch.equal(layer.delta(), torch.zeros_like(layer.delta()))


def test_a_source_is_refused_where_the_base_is_not_quantised_or_of_other_shapes(
    recipe: Path, tiny: Path
) -> None:
    rewritten(recipe, adapter={"variant": "olora", "source": str(tiny)})
    with pytest.raises(RecipeError, match=r"adapter.source: the base is not quantised"):
        prepare(read(recipe))
    rewritten(recipe, model={"quantize": "nf4"}, adapter={"source": MINILM})
    with pytest.raises(RecipeError, match=r"adapter.source does not fit .*\n.*\(16, 16\) in the"):
        prepare(read(recipe))
    rewritten(recipe, adapter={"source": "no/such/model"})
    with pytest.raises(RecipeError, match=r"adapter.source: model.name: 'no/such/model'"):
        prepare(read(recipe))


def test_modules_stored_in_codes_cannot_be_trained_whole(recipe: Path) -> None:
    rewritten(recipe, model={"quantize": "nf4"}, adapter={"also_train": ["attention.output"]})
    with pytest.raises(RecipeError, match=r"adapter.also_train: .* are stored in codes"):
        prepare(read(recipe))
    rewritten(recipe, adapter={"also_train": ["output.LayerNorm", "word_embeddings"]})
    prepare(read(recipe))

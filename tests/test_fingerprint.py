"""An adapter goes with the base it was trained over: another of the same shapes is refused."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
from conftest import MINILM, Answer
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lorakit import checkpoint, models
from lorakit.models import ModelSection, fingerprint
from lorakit.models.fingerprint import Fingerprint
from lorakit.models.heads import Head
from lorakit.run_folder import find
from lorakit.trained import open_trained

Lorakit = Callable[..., Answer]
RUN = Path("runs/tiny")
FIRST = "bert.embeddings.word_embeddings.weight"
LAYER = "encoder.layer.1.output.dense"


def known(name: object, kind: str | None = "SEQ_CLS", seed: int = 0, **given: Any) -> Fingerprint:
    labels = ("a", "b", "c") if kind == "SEQ_CLS" else ()
    section = ModelSection(name=str(name), **{"precision": "fp32", **given})
    return models.load(section, Head(labels, kind), seed).fingerprint


@contextmanager
def rewritten(base: Path, dtype: torch.dtype = torch.float32) -> Iterator[nn.Module]:
    """The model in a folder; what is done to it is written back."""
    model = AutoModel.from_pretrained(base)
    with torch.no_grad():
        yield model
    model.to(dtype).save_pretrained(base)


@pytest.fixture
def base(recipe: Path, tiny: Path) -> Path:
    """The recipe's base in a folder of its own, which a test may change."""
    shutil.copytree(tiny, "base")
    recipe.write_text(recipe.read_text().replace(str(tiny), "base"))
    return Path("base")


@pytest.fixture
def trained(base: Path, recipe: Path, lorakit: Lorakit) -> Path:
    answer = lorakit("train", recipe)
    assert answer.code == 0, answer.err
    return RUN


@pytest.fixture
def other(tiny: Path, tmp_path: Path) -> Path:
    """A base of the same shapes, drawn anew."""
    folder = shutil.copytree(tiny, tmp_path / "other")
    torch.manual_seed(1)
    BertModel(BertConfig.from_pretrained(tiny)).save_pretrained(folder)
    return folder


# what it is taken of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whatever_a_base_is_loaded_in_it_is_known_by_the_same(
    base: Path, dtype: torch.dtype
) -> None:
    with rewritten(base, dtype):
        pass
    loads: tuple[dict[str, Any], ...] = (
        {"precision": "bf16"},
        {"quantize": "nf4"},
        {"quantize": "fp4", "double_quant": True, "precision": "bf16"},
        {"quantize": "int8"},
        {"dropout": 0.5},
    )
    wanted = known(base)
    assert wanted.stored == str(dtype).removeprefix("torch.")
    assert [known(base, **given) for given in loads] == [wanted] * len(loads)


def test_a_head_that_starts_anew_is_no_part_of_it(base: Path) -> None:
    wanted = known(base)
    assert known(base, seed=1) == wanted
    assert not any("classifier" in name for name in wanted.tensors)
    assert len(wanted.tensors) == len(list(AutoModel.from_pretrained(base).parameters()))


def test_tied_weights_count_once(tmp_path: Path, tiny: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, vocab_size=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    for file in tiny.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    wanted = known(tmp_path, "CAUSAL_LM")
    assert known(tmp_path, "CAUSAL_LM", quantize="nf4", precision="bf16") == wanted
    assert len([name for name in wanted.tensors if "embed" in name or "head" in name]) == 1


def test_it_takes_no_time() -> None:
    loaded = models.load(ModelSection(name=MINILM, precision="fp32"), Head(("a", "b")), seed=0)
    start = perf_counter()
    assert fingerprint.of(loaded.model, loaded.head, None, None) == loaded.fingerprint
    assert perf_counter() - start < 0.2


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (16, 16), (384, 384), (100, 3), (7, 5, 3)])
def test_a_change_of_all_numbers_is_seen_in_a_tensor_of_any_shape(shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.register_parameter("p", nn.Parameter(torch.randn(shape)))
    before = fingerprint.of(model, (), None, None)
    model.p.data *= 1.01
    after = fingerprint.of(model, (), None, None)
    assert fingerprint.differences(before, after) == ["numbers differ in 1 of 1 tensors, first p"]


# what is told


def base_of(stored: str | None = "float32", commit: str | None = None, **tensors: str) -> Any:
    return Fingerprint(stored, commit, tensors)


@pytest.mark.parametrize(
    ("there", "here", "told"),
    [
        (base_of(a="2x3 00"), base_of(a="2x3 00"), []),
        (base_of(a="2x3 00"), base_of(a="2x3 01", b="1 00"), [0, 2]),
        (base_of(a="2x3 00"), base_of(b="2x3 00"), [1]),
        (base_of(a="2x3 00"), base_of(a="2x4 00"), [3]),
        (base_of(a="2x3 00"), base_of("bfloat16", a="2x3 00"), [4]),
        (base_of(None, a="2x3 00"), base_of("bfloat16", a="2x3 00"), []),
        (base_of(commit="1f", a="2x3 00"), base_of(commit="2e", a="2x3 00"), []),
        (base_of(commit="1f", a="2x3 00"), base_of(commit="2e", a="2x3 01"), [2, 5]),
    ],
)
def test_all_that_differs_is_told_with_the_first_place(
    there: Fingerprint, here: Fingerprint, told: list[int]
) -> None:
    words = (
        "1 tensors are in one of them alone, first b",
        "2 tensors are in one of them alone, first a",
        "numbers differ in 1 of 1 tensors, first a",
        "1 tensors have other shapes, first a: 2x3 then, 2x4 now",
        "its files store bfloat16, then float32",
        "it was of commit 1f",
    )
    assert fingerprint.differences(there, here) == [words[i] for i in told]


# what is refused, and what is not


COMMANDS = (
    ("eval", RUN),
    ("predict", RUN, "a warm film"),
    ("prune", RUN, "--out", "pruned"),
    ("merge", RUN, "--out", "merged"),
    ("export", RUN, "--out", "exported"),
)


def test_another_base_of_the_same_shapes_is_refused_by_every_command_but_for_force(
    trained: Path, other: Path, lorakit: Lorakit
) -> None:
    for command in COMMANDS:
        refused = lorakit(*command, "--base", other, "--json")
        assert (refused.code, refused.out) == (2, ""), command
        assert f"{find(trained)} was trained over another base model: 1 fault\n" in refused.err
        assert f"  numbers differ in 16 of 39 tensors, first {FIRST}\n" in refused.err
        assert "  Name the right one by --base, or go on by --force.\n" in refused.err
        assert not Path(command[-1]).is_dir() or command[-1] == RUN
        forced = lorakit(*command, "--base", other, "--json", "--force")
        assert forced.code == 0, forced.err
        assert "WARNING: " in forced.err
        assert "was trained over another base model" in forced.err
        assert json.loads(forced.out), command


@pytest.mark.parametrize("packed", [False, True])
def test_what_prune_writes_knows_its_base_too(
    base: Path, recipe: Path, other: Path, lorakit: Lorakit, packed: bool
) -> None:
    assert lorakit("train", recipe, "adapter.variant=blora").code == 0
    assert lorakit("prune", RUN, "--out", "out", *(["--packed"] if packed else [])).code == 0
    assert lorakit("eval", "out").code == 0
    refused = lorakit("eval", "out", "--base", other)
    assert refused.code == 2
    assert "out was trained over another base model: 1 fault" in refused.err


def test_an_adapter_that_was_forced_stays_one_of_the_base_it_was_trained_over(
    trained: Path, other: Path, lorakit: Lorakit
) -> None:
    assert lorakit("prune", trained, "--out", "out", "--base", other, "--force").code == 0
    assert lorakit("eval", "out", "--base", other).code == 2
    assert lorakit("eval", "out").code == 0


def test_the_same_weights_at_another_place_are_the_same_base(
    trained: Path, lorakit: Lorakit
) -> None:
    Path("base").rename("moved")
    assert lorakit("eval", trained).code == 2  # it is not there
    answer = lorakit("eval", trained, "--base", "moved")
    assert answer.code == 0, answer.err
    assert "WARNING" not in answer.err


def test_a_base_of_one_other_layer_is_refused_by_the_layer_s_name(
    trained: Path, base: Path, lorakit: Lorakit
) -> None:
    with rewritten(base) as model:
        model.get_submodule(LAYER).weight *= 1.01
    answer = lorakit("eval", trained)
    assert answer.code == 2
    assert f"numbers differ in 1 of 39 tensors, first bert.{LAYER}.weight" in answer.err


def test_a_base_whose_weights_were_rounded_is_refused_by_what_it_stores(
    trained: Path, base: Path, lorakit: Lorakit
) -> None:
    with rewritten(base, torch.bfloat16):
        pass
    answer = lorakit("eval", trained)
    assert answer.code == 2
    assert "another base model: 1 fault\n  its files store bfloat16, then float32" in answer.err


def test_a_run_is_gone_on_with_over_its_own_base_alone(
    trained: Path, base: Path, lorakit: Lorakit
) -> None:
    shutil.rmtree(trained / "checkpoints" / "step-000006")
    with rewritten(base) as model:
        model.get_submodule(LAYER).weight *= 1.01
    refused = lorakit("train", trained, "--resume")
    assert refused.code == 2
    assert "step-000003 was trained over another base model: 1 fault" in refused.err
    assert "Put it back, or go on by --force." in refused.err
    assert (trained / "checkpoints" / "last").read_text() == "step-000006\n"  # nothing was touched
    forced = lorakit("train", trained, "--resume", "--force")
    assert forced.code == 0, forced.err
    assert "WARNING: " in forced.err
    assert "resumed at step 3 of 6" in forced.err
    assert checkpoint.meta(find(trained, "6")).base == known(base)


def test_force_says_nothing_to_a_run_that_begins(recipe: Path, lorakit: Lorakit) -> None:
    answer = lorakit("train", recipe, "--force")
    assert answer.code == 2
    assert "--force: goes with --resume" in answer.err


def test_a_folder_of_nobody_knows_which_base_is_taken_with_any(
    trained: Path, other: Path, lorakit: Lorakit
) -> None:
    """As PEFT writes them, and as earlier versions of lorakit did."""
    assert lorakit("prune", trained, "--out", "out").code == 0
    Path("out/lorakit-manifest.json").unlink()
    card = json.loads(Path("out/lorakit.json").read_text())
    del card["base"]
    Path("out/lorakit.json").write_text(json.dumps(card))
    assert open_trained(Path("out"), base=str(other)).warnings == ()
    Path("out/lorakit.json").unlink()
    assert open_trained(Path("out"), base=str(other)).warnings == ()

"""Train, prune, and load by peft: whole families of models, heads and modules trained whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from test_models import saved
from torch.testing import assert_close

from lorakit import export, models
from lorakit.errors import LorakitError
from lorakit.prune import Selection
from lorakit.trained import logits, open_trained

FAMILIES = {
    "BertModel": ("BertConfig", {}),
    "RobertaModel": ("RobertaConfig", {}),
    "DebertaV2Model": ("DebertaV2Config", {}),
    "DistilBertModel": (
        "DistilBertConfig",
        {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    ),
}
SPARSITY = {"xi": 0.1, "gate_init": "normal"}
AUTO = peft.AutoPeftModelForSequenceClassification


def trained(recipe: Path, lorakit: Callable[..., Any], model: Path, **adapter: Any) -> Path:
    """A run of a few lively steps on `model`."""
    given = yaml.safe_load(recipe.read_text())
    given["model"]["name"] = str(model)
    method = {} if "variant" in adapter else {"variant": "sora", "sparsity": SPARSITY}
    given["adapter"] = {"rank": 4, "alpha": 32, **method, **adapter}
    given["train"] |= {"lr": 0.05, "save_every": None}
    recipe.write_text(yaml.safe_dump(given))
    answer = lorakit("train", recipe)
    assert answer.code == 0, answer.err
    return Path("runs/tiny")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_is_pruned_of_each_family_head_included(
    recipe: Path, lorakit: Callable[..., Any], tiny: Path, tmp_path: Path, family: str
) -> None:
    config, sizes = FAMILIES[family]
    run = trained(recipe, lorakit, saved(tmp_path / "base", tiny, config, family, **sizes))
    assert lorakit("prune", run, "--checkpoint", "last").code == 0
    ours = open_trained(run, "last").model
    theirs = AUTO.from_pretrained(run / "pruned", num_labels=2).eval()
    rows = models.probe(ours)
    assert_close(logits(theirs, rows), logits(ours, rows), rtol=0, atol=1e-5)
    with theirs.disable_adapter():
        off = logits(theirs, rows)
    assert (off - logits(ours, rows)).abs().max() > 1e-3


def test_modules_trained_whole_travel_too(
    recipe: Path, lorakit: Callable[..., Any], tiny: Path
) -> None:
    run = trained(recipe, lorakit, tiny, also_train=["output.LayerNorm", "word_embeddings"])
    assert lorakit("prune", run, "--checkpoint", "last").code == 0
    ours = open_trained(run, "last").model
    theirs = AUTO.from_pretrained(run / "pruned", num_labels=2).eval()
    rows = models.probe(ours)
    assert_close(logits(theirs, rows), logits(ours, rows), rtol=0, atol=1e-5)
    saved_whole = json.loads((run / "pruned" / "adapter_config.json").read_text())[
        "modules_to_save"
    ]
    assert len(saved_whole) == 2 * 2 + 1 + 1  # norms, embeddings, head


def test_a_run_whose_gates_all_closed_still_prunes_to_a_folder_that_loads(
    recipe: Path, lorakit: Callable[..., Any], tiny: Path
) -> None:
    run = trained(recipe, lorakit, tiny, sparsity={"xi": 5.0})
    answer = lorakit("prune", run, "--checkpoint", "last")
    assert answer.code == 0
    assert "no rank is left" in answer.out
    ours = open_trained(run, "last").model
    theirs = AUTO.from_pretrained(run / "pruned", num_labels=2).eval()
    rows = models.probe(ours)
    assert_close(logits(theirs, rows), logits(ours, rows), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("--rank", "1"),
        ("--energy", "0.9"),
        ("--keep", "0.2"),
        ("--keep", "0.2", "--of", "parameters"),
        ("--layout", "uniform"),
    ],
)
def test_every_way_to_prune_gives_the_folder_that_its_numbers_tell_of(
    recipe: Path, lorakit: Callable[..., Any], tiny: Path, options: tuple[str, ...]
) -> None:
    run = trained(recipe, lorakit, tiny)
    answer = lorakit("prune", run, *options, "--checkpoint", "last", "--out", "out", "--json")
    assert answer.code == 0, answer.err
    told = json.loads(answer.out)
    config = json.loads(Path("out/adapter_config.json").read_text())
    found = open_trained(Path("out"))
    kept = {name: rank for name, rank in told["ranks"].items() if rank}
    if "uniform" in options:
        assert not config["rank_pattern"]
        assert {layer.r for layer in found.layers.values()} == {max(kept.values())}
    else:
        assert {name: layer.r for name, layer in found.layers.items()} == kept
    parameters = sum(layer.factors().parameters for layer in found.layers.values())
    assert told["parameters"][1] == parameters
    assert told["size"][1] == Path("out/adapter_model.safetensors").stat().st_size
    rows = models.probe(found.model)
    shift = logits(found.model, rows) - logits(open_trained(run, "last").model, rows)
    assert told["shift"] == pytest.approx(float(shift.abs().max()), abs=1e-6)
    assert (told["error"] > 0) == ("uniform" not in options)


def test_a_folder_that_answers_wrongly_is_not_left_behind(
    recipe: Path, lorakit: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that `prune` makes can fail: here the folder is spoilt as it is written."""
    run = open_trained(trained(recipe, lorakit, tiny), "last")
    write = export.peft_format.write

    def spoilt(folder: Path, adapter: Any) -> None:
        head = {"weight": torch.zeros(2, 16), "bias": torch.ones(2)}
        write(folder, adapter._replace(whole={"classifier": head}))

    monkeypatch.setattr(export.peft_format, "write", spoilt)
    with pytest.raises(LorakitError, match="read back, its logits differ by"):
        export.export(run, Path("out"), Selection())
    assert not Path("out").exists()
    assert not list(Path().glob(".out*"))


def test_nothing_is_overwritten(recipe: Path, lorakit: Callable[..., Any], tiny: Path) -> None:
    run = trained(recipe, lorakit, tiny)
    assert lorakit("prune", run).code == 0
    before = (run / "pruned" / "adapter_model.safetensors").read_bytes()
    answer = lorakit("prune", run, "--rank", "1")
    assert answer.code == 2
    assert "exists; nothing is overwritten. Choose another with --out" in answer.err
    assert (run / "pruned" / "adapter_model.safetensors").read_bytes() == before

"""PEFT's files, judged by peft: written by us and loaded there, written there and read by us."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import MINILM
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lorakit import models, peft_format
from lorakit.adapter import Factors
from lorakit.errors import FolderError
from lorakit.fitting import with_pairs
from lorakit.models import Base, ModelSection
from lorakit.models.heads import Head
from lorakit.peft_format import PeftAdapter
from lorakit.prune import padded
from lorakit.trained import logits, open_trained

LABELS = ("a", "b", "c")
QUERY = "bert.encoder.layer.{}.attention.self.query"
DENSE = "bert.encoder.layer.{}.output.dense"


def minilm(labels: tuple[str, ...] = LABELS) -> Base:
    return models.load(ModelSection(name=MINILM, precision="fp32"), Head(labels), seed=0)


def pair(model: nn.Module, name: str, rank: int) -> Factors:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    A, B = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
    return Factors(A / linear.in_features**0.5, B / linear.out_features**0.5)


@pytest.fixture(scope="module")
def adapter() -> PeftAdapter:
    """Six modules of MiniLM at ranks from 1 to 9, and a head."""
    torch.manual_seed(1)
    base = minilm().model
    ranks = {QUERY.format(0): 1, QUERY.format(1): 9, DENSE.format(0): 4, DENSE.format(1): 2}
    ranks |= {DENSE.format(5): 9, "bert.pooler.dense": 3}
    pairs = {name: pair(base, name, rank) for name, rank in ranks.items()}
    head = {"weight": torch.randn(3, 384), "bias": torch.randn(3)}
    return PeftAdapter(pairs, {"classifier": head}, resolved(), "SEQ_CLS")


def resolved() -> str:
    return models.resolve(MINILM)


def ours(adapter: PeftAdapter) -> torch.Tensor:
    """The logits of the base with W + B A, and the head, put in by hand."""
    model = minilm().model.eval()
    with torch.no_grad():
        for name, (A, B) in adapter.pairs.items():
            model.get_submodule(name).weight.add_(B @ A)  # type: ignore[operator]
        for name, state in adapter.whole.items():
            model.get_submodule(name).load_state_dict(state)
    return logits(model, models.probe(model))


def theirs(folder: Path) -> torch.Tensor:
    """The logits with `folder` loaded by peft."""
    model = peft.PeftModel.from_pretrained(minilm().model, folder).eval()
    return logits(model, models.probe(model.base_model.model))


@pytest.mark.parametrize("layout", ["pattern", "uniform"])
def test_peft_reads_what_we_write(adapter: PeftAdapter, tmp_path: Path, layout: str) -> None:
    pairs = padded(adapter.pairs) if layout == "uniform" else adapter.pairs
    peft_format.write(tmp_path, adapter._replace(pairs=pairs))
    assert_close(theirs(tmp_path), ours(adapter), rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == (layout == "pattern")


def test_the_scale_is_one_for_every_reader(adapter: PeftAdapter, tmp_path: Path) -> None:
    """Global alpha over r, and the pattern's alpha over the pattern's rank, module by module."""
    peft_format.write(tmp_path, adapter)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 9
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["rank_pattern"][QUERY.format(0)] == 1
    assert not config["use_rslora"]


def test_keys_in_the_file_are_pefts(adapter: PeftAdapter, tmp_path: Path) -> None:
    """The names peft itself saves, head included."""
    (tmp_path / "ours").mkdir()
    peft_format.write(tmp_path / "ours", adapter)
    model = peft.PeftModel.from_pretrained(minilm().model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    mine, other = (
        load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs")
    )
    assert mine.keys() == other.keys()
    assert_close(mine, other, rtol=0, atol=0)


def test_the_card_s_call_loads_it_without_naming_the_base(
    adapter: PeftAdapter, tmp_path: Path
) -> None:
    peft_format.write(tmp_path, adapter)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    rows = models.probe(model.base_model.model)
    assert_close(logits(model.eval(), rows), ours(adapter), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 6, "lora_alpha": 12},
        {"r": 16, "lora_alpha": 8, "use_rslora": True},
        {
            "r": 8,
            "lora_alpha": 8,
            "rank_pattern": {"output.dense": 3, r"^bert\.encoder\.layer\.1\..*query": 5},
            "alpha_pattern": {"layer.0.attention.self.query": 32},
        },
    ],
)
def test_we_read_what_peft_writes(settings: dict[str, Any], tmp_path: Path) -> None:
    """Scales by global alpha, by pattern and by rslora, as peft resolves them."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "output.dense"], **settings
    )
    model = peft.get_peft_model(minilm().model, config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.copy_(0.1 * torch.randn_like(p))
    want = logits(model, models.probe(model.base_model.model))
    model.save_pretrained(tmp_path)

    found = peft_format.read(tmp_path)
    base = minilm()
    with_pairs(base, found.pairs, found.whole, tmp_path)
    assert_close(logits(base.model.eval(), models.probe(base.model)), want, rtol=0, atol=1e-5)
    assert set(found.whole) == {"classifier"}


def test_an_adapter_with_no_rank_left_still_loads_and_brings_its_head(
    adapter: PeftAdapter, tmp_path: Path
) -> None:
    dead = {name: Factors(A[:0], B[:, :0]) for name, (A, B) in adapter.pairs.items()}
    peft_format.write(tmp_path, adapter._replace(pairs=dead))
    assert_close(theirs(tmp_path), ours(adapter._replace(pairs={})), rtol=0, atol=1e-5)


def test_a_name_that_is_another_s_end_gets_an_anchored_key(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(6, 6, bias=False)
            self.inner = nn.ModuleDict({"proj": nn.Linear(6, 6, bias=False)})
            self.last = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.last(self.inner["proj"](self.proj(x)))
            return y

    model = Deep()
    ranks = {"proj": 1, "inner.proj": 2, "last": 4}
    pairs = {name: pair(model, name, rank) for name, rank in ranks.items()}
    x = torch.randn(3, 6)
    peft_format.write(tmp_path, PeftAdapter(pairs, {}, "", None))
    keys = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert set(keys) == {"^proj", "inner.proj"}
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    before = {name: model.get_submodule(name).base_layer.weight for name in ranks}  # type: ignore[union-attr]
    want = x
    for name in ("proj", "inner.proj", "last"):
        want = want @ (before[name] + pairs[name].B @ pairs[name].A).T  # type: ignore[operator]
    assert_close(loaded(x), want, rtol=1e-4, atol=1e-5)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "olora"}, "changed base"),
        ({"modules_to_save": None}, "classifier.weight: neither"),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(
    adapter: PeftAdapter, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    peft_format.write(tmp_path, adapter)
    edit(tmp_path, **changes)
    with pytest.raises(FolderError, match=says):
        peft_format.read(tmp_path)


def test_all_faults_of_an_adapter_s_weights_are_listed(
    adapter: PeftAdapter, tmp_path: Path
) -> None:
    peft_format.write(tmp_path, adapter)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    prefix = "base_model.model.bert.pooler.dense"
    del tensors[f"{prefix}.lora_A.weight"]
    tensors[f"{prefix}.lora_magnitude_vector"] = torch.ones(3)
    save_file(tensors, path)
    with pytest.raises(FolderError, match=r"(?s)2 faults.*A or B is missing.*magnitude"):
        peft_format.read(tmp_path)


def test_an_adapter_of_another_base_is_refused_by_name_and_shape(
    adapter: PeftAdapter, tmp_path: Path
) -> None:
    base = minilm()
    wrong = {
        "bert.encoder.layer.99.output.dense": next(iter(adapter.pairs.values())),
    }
    with pytest.raises(FolderError, match=r"layer\.99.*no such module"):
        with_pairs(base, wrong, {}, tmp_path)
    narrow = {QUERY.format(0): Factors(torch.zeros(2, 100), torch.zeros(384, 2))}
    with pytest.raises(FolderError, match="the pair is 384 x 100, the base 384 x 384"):
        with_pairs(minilm(), narrow, {}, tmp_path)


def test_any_peft_folder_can_be_pruned(
    tmp_path: Path, lorakit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that peft trained and saved; loaded by peft again afterwards."""
    monkeypatch.chdir(tmp_path)
    base = minilm()
    base.model.config._name_or_path = resolved()
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=32, target_modules=["query"])
    model = peft.get_peft_model(base.model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.02 * torch.randn_like(p))
    model.save_pretrained("foreign")
    edit(Path("foreign"), base_model_name_or_path=resolved())

    answer = lorakit("prune", "foreign", "--keep", 0.5, "--out", "half", "--json")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert sum(result["ranks"].values()) == 6 * 8 // 2
    assert 0 < result["error"] < 1
    assert result["difference"] < 1e-4 < result["shift"]
    again = peft.PeftModel.from_pretrained(minilm().model, "half").eval()
    mine = open_trained(Path("half")).model
    rows = models.probe(mine)
    assert_close(logits(again, rows), logits(mine, rows), rtol=0, atol=1e-5)

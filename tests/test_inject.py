"""Which linears are adapted, at which rank, and what else is trained."""

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.adapter import Factors
from lorakit.errors import RecipeError
from lorakit.inject import inject, plan, sites, trained_whole
from lorakit.variants.lora import LoRAConfig, LoRALinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 24), "down": nn.Linear(24, 8)})
        self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.attention = nn.MultiheadAttention(8, 2)  # reads its projection's weight itself
        self.pooler = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)


HEAD = ("classifier",)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model()


def config(**settings: Any) -> LoRAConfig:
    return LoRAConfig.model_validate({"variant": "lora", "rank": 4, "alpha": 4.0, **settings})


def chosen(model: nn.Module, **settings: Any) -> list[str]:
    return list(sites(model, config(**settings), HEAD))


def test_all_linear_is_every_linear_but_the_head_and_those_never_called(model: Model) -> None:
    names = chosen(model)
    assert len(names) == 12 * 4 + 1
    assert "pooler" in names
    assert not any("classifier" in name or "out_proj" in name for name in names)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (("query",), 12),
        (("mlp.up", "key"), 24),
        ("query", 12),
        (("blocks.3.query",), 1),
        ((r"blocks\.[0-3]\.(query|key)",), 8),
        ((r".*\.down",), 12),
        (("pooler",), 1),
    ],
)
def test_a_target_is_the_end_of_a_name_or_a_regular_expression_for_all_of_it(
    model: Model, targets: Any, count: int
) -> None:
    assert len(chosen(model, targets=targets)) == count


def test_a_name_ends_at_a_dot(model: Model) -> None:
    """`ery` is the end of `query`'s letters, not of its name; `1.query` is not `11.query`."""
    with pytest.raises(RecipeError, match="'ery'"):
        chosen(model, targets=("ery",))
    assert chosen(model, targets=("1.query",)) == ["blocks.1.query"]


def test_excluded_names_and_other_blocks_stay_out(model: Model) -> None:
    assert len(chosen(model, exclude=("query",))) == 12 * 3 + 1
    names = chosen(model, targets=("query", "pooler"), layers="0-2,11")
    assert names == [f"blocks.{i}.query" for i in (0, 1, 2, 11)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"targets": ("qury",)}, r"targets: no linear is named 'qury'. Nearest: 'query'"),
        ({"targets": ("query", "vlue")}, "vlue"),
        ({"targets": ("classifier",)}, "classifier"),
        ({"exclude": ("keys",)}, r"exclude: no linear is named 'keys'. Nearest: 'key'"),
        ({"layers": "10-13"}, r"no block 12, 13; this model has 0 to 11"),
        ({"targets": ("query",), "exclude": ("query",)}, "leave no linear"),
        ({"targets": ("(",)}, r"no linear is named '\(', nor is it a regular expression: missing"),
    ],
)
def test_what_matches_nothing_is_refused_with_what_is_there(
    model: Model, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        chosen(model, **settings)
    assert "linears here: key, mlp.down, mlp.up, pooler, query" in str(error.value)


def test_all_that_matches_nothing_is_listed_at_once(model: Model) -> None:
    with pytest.raises(RecipeError, match=r"(?s)'one'.*'two'.*'three'"):
        chosen(model, targets=("one", "two"), exclude=("three",))


def test_ranks_by_name_override_and_zero_leaves_out(model: Model) -> None:
    given = config(ranks={"query": 2, "blocks.0.query": 7, "pooler": 0})
    plans = plan(given, sites(model, given, HEAD))
    assert plans["blocks.5.query"].rank == 2
    assert plans["blocks.0.query"].rank == 7
    assert plans["blocks.5.key"].rank == 4
    assert "pooler" not in plans
    assert {planned.scale for planned in plans.values()} == {1.0}


def test_a_rank_larger_than_its_matrix_is_refused_for_every_kind_of_matrix(model: Model) -> None:
    given = config(rank=9, targets=("pooler", "mlp.up"))
    with pytest.raises(RecipeError, match=r"2 faults") as error:
        plan(given, sites(model, given, HEAD))
    assert "pooler: rank 9 is larger than its matrix, 8 x 8" in str(error.value)
    assert "mlp.up in 12 blocks: rank 9 is larger than its matrix, 24 x 8" in str(error.value)


def test_learned_ranks_leave_the_other_sites_out(model: Model) -> None:
    given = config()
    found = sites(model, given, HEAD)
    plans = plan(given, found, ranks={"pooler": 3, "blocks.0.key": 1, "blocks.1.key": 0})
    assert {name: planned.rank for name, planned in plans.items()} == {
        "blocks.0.key": 1,
        "pooler": 3,
    }


def test_ranks_of_modules_that_are_no_targets_are_refused(model: Model) -> None:
    given = config(targets=("query",))
    with pytest.raises(RecipeError, match="pooler: adapted there, not among"):
        plan(given, sites(model, given, HEAD), ranks={"pooler": 3})


def test_an_own_rank_that_is_not_the_starts_is_refused(model: Model) -> None:
    given = config(targets=("pooler",), ranks={"pooler": 2})
    start = Factors(torch.randn(3, 8), torch.randn(8, 3))
    with pytest.raises(RecipeError, match="pooler: 2, but the adapter of init_from has 3 there"):
        plan(given, sites(model, given, HEAD), starts={"pooler": start})


def test_a_start_is_taken_over_with_its_scale_undone(model: Model) -> None:
    given = config(alpha=12.0, targets=("pooler",))
    start = Factors(torch.randn(3, 8), torch.randn(8, 3))
    plans = plan(given, sites(model, given, HEAD), starts={"pooler": start})
    copy = Model()
    layer = inject(copy, plans, LoRALinear, given)["pooler"]
    assert layer.scale == 3.0
    torch.testing.assert_close(layer.factors().B, start.B)
    assert torch.equal(layer.factors().A, start.A)


def test_only_adapters_and_whole_modules_train() -> None:
    copy, given = Model(), config(targets=("query",), also_train=("norm",))
    whole = trained_whole(copy, HEAD, given.also_train)
    inject(copy, plan(given, sites(copy, given, whole)), LoRALinear, given, whole, HEAD)
    trained = {name for name, p in copy.named_parameters() if p.requires_grad}
    kinds = {name.split(".", 2)[-1] if name.startswith("blocks") else name for name in trained}
    assert kinds == {
        "query.A",
        "query.B",
        "norm.weight",
        "norm.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_a_module_trained_whole_is_not_adapted_too(model: Model) -> None:
    whole = trained_whole(model, HEAD, ("blocks.0",))
    names = sites(model, config(), whole)
    assert not any(name.startswith("blocks.0.") for name in names)
    assert "blocks.10.query" in names


def test_also_train_that_names_nothing_is_refused(model: Model) -> None:
    with pytest.raises(RecipeError, match=r"no module 'norms'. Nearest: 'norm'"):
        trained_whole(model, HEAD, ("norms",))


def test_gpt2_s_transposed_linears_are_adapted_by_their_true_widths() -> None:
    from transformers.pytorch_utils import Conv1D

    outer = nn.ModuleDict({"c_attn": Conv1D(24, 8)})  # 8 in, 24 out
    given = config(targets=("c_attn",))
    layer = inject(outer, plan(given, sites(outer, given, ())), LoRALinear, given)["c_attn"]
    assert (layer.n, layer.m) == (8, 24)
    x = torch.randn(2, 8)
    assert torch.equal(layer(x), layer.base(x))

"""Laws that hold for every variant. `config` runs each of them over every file of the folder.

A law is asked of a variant that promises it; `test_promises_are_as_written_here` pins who does.
"""

import json
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import peft
import pytest
import torch
import yaml
from conftest import MINILM
from planted import injected, net, pupil, section, taught
from torch import Tensor, nn
from torch.testing import assert_close

from lorakit import models, peft_format, variants
from lorakit.adapter import Adapter, Plan, Promises, VariantConfig
from lorakit.errors import NotLowRankError
from lorakit.models import Base, ModelSection
from lorakit.models.heads import Head
from lorakit.peft_format import PeftAdapter
from lorakit.prune import plain
from lorakit.train import compact

SHORT = {"sora": {"sparsity": {"lambda": 3.0, "gate_lr": 0.1}}}
"""Settings that make something happen within a few steps."""

SETTINGS = {"lr", "lr_scale", "weight_decay"}
"""What a layer may set for a parameter of its own."""

PROMISES = {
    "adalora": Promises(exact_start=True, low_rank=True, exchangeable_ranks=True),
    "blora": Promises(exact_start=True, low_rank=True, exchangeable_ranks=False),
    "dora": Promises(exact_start=True, low_rank=False, exchangeable_ranks=True),
    "lora": Promises(exact_start=True, low_rank=True, exchangeable_ranks=True),
    "sora": Promises(exact_start=True, low_rank=True, exchangeable_ranks=True),
    "olora": Promises(exact_start=True, low_rank=True, pair_ranks=2, exchangeable_ranks=True),
    "pissa": Promises(exact_start=True, low_rank=True, pair_ranks=2, exchangeable_ranks=True),
}


def config_of(variant: str, **settings: object) -> VariantConfig:
    given = {"variant": variant, "rank": 4, "alpha": 8.0, **SHORT.get(variant, {}), **settings}
    return variants.get(variant).config.model_validate(given)


@pytest.fixture(params=variants.names())
def config(request: pytest.FixtureRequest) -> VariantConfig:
    """Every variant in turn: a new file is under test at once."""
    return config_of(request.param)


@pytest.fixture
def layers(config: VariantConfig) -> dict[str, Adapter]:
    return injected(net(), config)


def promises(config: VariantConfig, promise: str) -> None:
    if not getattr(variants.get(config.variant).promises, promise):
        pytest.skip(f"{config.variant} does not promise {promise}")


def own_parameters(layer: Adapter) -> Iterable[nn.Parameter]:
    return (p for name, p in layer.named_parameters() if not name.startswith("base."))


@torch.no_grad()
def scramble(layers: Iterable[Adapter]) -> None:
    """Moves every parameter off its start, and kills ranks 0 and 2 where there are gates."""
    for layer in layers:
        for p in own_parameters(layer):
            p.add_(0.3 * torch.randn_like(p))
            if p.shape == (layer.r,):
                p[::2] = 0.0


@torch.no_grad()
def added(layer: Adapter, x: Tensor) -> Tensor:
    """What a layer's output is beyond its base's, in evaluation."""
    layer.eval()
    return layer(x) - layer.base(x)


def rewrite(recipe: Path, **sections: object) -> None:
    """Replaces whole sections of a recipe."""
    given = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**given, **sections}))


def trained(layer: Adapter) -> list[str]:
    """The parameters with a slice for each rank."""
    return [name for name in layer.ranked if isinstance(getattr(layer, name), nn.Parameter)]


def live_ranks(layer: Adapter) -> Tensor:
    """Ranks without which the layer's update is another, in ascending order."""
    whole, ranks = layer.delta(), torch.arange(layer.r)
    without = [deepcopy(layer) for _ in ranks]
    for i, other in enumerate(without):
        other.compact(ranks[ranks != i])
    return ranks[[not torch.allclose(other.delta(), whole, atol=1e-6) for other in without]]


@torch.no_grad()
def permute_ranks(layer: Adapter, order: Tensor) -> None:
    """Reorders every axis of length r of the layer's own parameters and buffers."""
    own = layer.own_state()
    for name, value in own.items():
        for axis, length in enumerate(value.shape):
            if length == layer.r:
                own[name].copy_(value.index_select(axis, order))


def minilm() -> Base:
    section = ModelSection(name=MINILM, precision="fp32")
    return models.load(section, Head(("a", "b", "c")), seed=0)


@pytest.mark.parametrize("variant", PROMISES)
def test_promises_are_as_written_here(variant: str) -> None:
    assert variants.get(variant).promises == PROMISES[variant]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_is_the_base_model_bit_for_bit(
    config: VariantConfig, dtype: torch.dtype
) -> None:
    promises(config, "exact_start")
    model = net().to(dtype)
    x = torch.randn(4, 16).to(dtype)
    before = model(x)
    injected(model, config)
    assert torch.equal(model(x), before)


def test_a_fresh_adapter_is_the_pretrained_transformer_bit_for_bit(config: VariantConfig) -> None:
    promises(config, "exact_start")
    model = minilm().model.eval()
    rows = models.probe(model)
    with torch.no_grad():
        before = model(**rows).logits
        injected(model, config, whole=["classifier"])
        assert torch.equal(model(**rows).logits, before)


def test_it_trains_nothing_but_itself(config: VariantConfig) -> None:
    model = net()
    layers = injected(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.split(".")[0] in layers and ".base." not in name for name in trained)


def test_a_layer_alone_freezes_its_base(config: VariantConfig) -> None:
    alone = variants.get(config.variant).layer(nn.Linear(8, 8), config, Plan(4, config.scale))
    assert not any(p.requires_grad for p in alone.base.parameters())


def test_training_never_edits_the_base(config: VariantConfig) -> None:
    settings = section(steps=5)
    trainee, before = pupil(config, settings), net().state_dict()
    taught(trainee, settings)
    for name, layer in trainee.layers.items():
        for key, value in layer.base.state_dict().items():
            assert torch.equal(value, before[f"{name}.{key}"])


def test_adapters_are_float32_over_a_bfloat16_base_and_answer_in_bfloat16(
    config: VariantConfig,
) -> None:
    model = net().bfloat16()
    layers = injected(model, config)
    assert {p.dtype for layer in layers.values() for p in own_parameters(layer)} == {torch.float32}
    assert model(torch.randn(4, 16).bfloat16()).dtype == torch.bfloat16


def test_delta_is_what_a_layer_adds_to_its_base_in_evaluation(layers: dict[str, Adapter]) -> None:
    """By whichever of `base_output`, `update` and `finish`."""
    scramble(layers.values())
    for layer in layers.values():
        x, delta = torch.randn(3, 5, layer.n), layer.delta()
        assert_close(x @ delta.T, added(layer, x), rtol=1e-4, atol=2e-5)
        assert delta.shape == (layer.m, layer.n)
        assert delta.dtype == torch.float32
        assert not delta.requires_grad


def test_factors_are_what_a_layer_adds_to_its_base_in_evaluation(
    layers: dict[str, Adapter], config: VariantConfig
) -> None:
    promises(config, "low_rank")
    scramble(layers.values())
    for layer in layers.values():
        x, (A, B) = torch.randn(3, 5, layer.n), layer.factors()
        assert_close(x @ A.T @ B.T, added(layer, x), rtol=1e-4, atol=2e-5)
        assert not A.requires_grad
        assert not B.requires_grad


def test_what_is_no_low_rank_says_so_and_is_still_scored(
    recipe: Path, lorakit, config: VariantConfig
) -> None:
    """`prune`, and a run that would start from it, are refused with the layer's own reason."""
    if variants.get(config.variant).promises.low_rank:
        pytest.skip(f"{config.variant} is low-rank")
    with pytest.raises(NotLowRankError) as reason:
        injected(net(), config)["up"].factors()
    rewrite(recipe, adapter={"variant": config.variant, "rank": 4})
    assert lorakit("train", recipe, "--dry-run").code == 0
    assert lorakit("train", recipe).code == 0
    assert lorakit("eval", "runs/tiny").code == 0
    pruned = lorakit("prune", "runs/tiny")
    assert (pruned.code, Path("runs/tiny/pruned").exists()) == (2, False)
    assert str(reason.value) in pruned.err

    rewrite(recipe, adapter={"variant": "lora", "init_from": "runs/tiny"}, output_dir="runs/next")
    started = lorakit("train", recipe)
    assert (started.code, Path("runs/next").exists()) == (2, False)
    assert f"adapter.init_from: {reason.value}" in started.err


def test_the_live_rank_is_the_rank_of_the_factors(
    layers: dict[str, Adapter], config: VariantConfig
) -> None:
    promises(config, "low_rank")
    times = variants.get(config.variant).promises.pair_ranks
    scramble(layers.values())
    for layer in layers.values():
        A, B = layer.factors()
        assert A.shape == (times * layer.rank(), layer.n)
        assert B.shape == (layer.m, times * layer.rank())


def test_the_scale_does_not_follow_the_rank(config: VariantConfig) -> None:
    """A module that starts with another rank than the recipe's keeps the recipe's scale."""
    layers = injected(net(), config, ranks={"up": 2, "down": 7})
    assert {layer.scale for layer in layers.values()} == {config.scale}


def test_looking_changes_nothing(layers: dict[str, Adapter]) -> None:
    """`delta` and `rank` are asked in the middle of training, to log."""
    before, random = {}, torch.get_rng_state()
    for name, layer in layers.items():
        before[name] = {key: value.clone() for key, value in layer.own_state().items()}
        layer.delta()
        layer.rank()
    assert torch.equal(torch.get_rng_state(), random)
    assert_close({n: layer.own_state() for n, layer in layers.items()}, before, rtol=0, atol=0)


def test_settings_of_the_optimizer_name_parameters_of_the_layer(layers: dict[str, Adapter]) -> None:
    for layer in layers.values():
        own = {name for name, _ in layer.named_parameters() if not name.startswith("base.")}
        assert set(layer.optim()) <= own
        assert {key for given in layer.optim().values() for key in given} <= SETTINGS


@pytest.mark.parametrize("steps", [40, 101, 1000])
def test_stages_add_up_to_the_run(config: VariantConfig, steps: int) -> None:
    stages = pupil(config, section(steps=steps)).controller.stages()
    assert sum(stage.steps for stage in stages) == steps
    assert all(stage.steps > 0 and stage.rate >= 0 for stage in stages)


def test_a_penalty_is_a_finite_number_with_finite_gradients_at_the_start(
    config: VariantConfig,
) -> None:
    trainee = pupil(config, section())
    penalty = trainee.controller.penalty()
    if penalty is None:
        pytest.skip(f"{config.variant} adds nothing to the loss")
    assert penalty.shape == ()
    assert penalty.isfinite()
    if penalty.requires_grad:
        penalty.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainee.model.parameters())


def test_what_is_told_is_json_and_hides_no_number_of_the_loop(config: VariantConfig) -> None:
    settings = section(steps=40)
    trainee = pupil(config, settings)
    for _ in range(2):  # before the run and after it
        told = trainee.controller.told()
        assert json.loads(json.dumps(told, allow_nan=False)) == told
        assert not set(told) & {"step", "loss", "norm", "lr", "samples_per_s", "ranks"}
        taught(trainee, settings)


def test_compacting_away_dead_ranks_changes_nothing(config: VariantConfig) -> None:
    """The moments of the ranks that stay follow, and the optimizer forgets the others."""
    settings = section(steps=3)
    trainee = pupil(config, settings)
    if not all(layer.ranked for layer in trainee.layers.values()):
        pytest.skip(f"{config.variant} has no ranks to compact")
    taught(trainee, settings)
    scramble(trainee.layers.values())
    for name, layer in trainee.layers.items():
        x, kept = torch.randn(3, layer.n), live_ranks(layer)
        before, rank, delta = added(layer, x), layer.rank(), layer.delta()
        moments = {key: trainee.optimizer.state[getattr(layer, key)] for key in trained(layer)}
        values = {key: getattr(layer, key).detach() for key in layer.ranked}
        compact(trainee, {name: kept})
        assert layer.r == 4
        assert layer.rank() == rank == len(kept)
        assert_close(added(layer, x), before, rtol=1e-5, atol=1e-5)
        assert_close(layer.delta(), delta, rtol=1e-5, atol=1e-6)
        for key, old in values.items():
            assert torch.equal(getattr(layer, key), old.index_select(layer.ranked[key], kept))
        for key, old in moments.items():
            new = trainee.optimizer.state[getattr(layer, key)]
            for moment in ("exp_avg", "exp_avg_sq"):
                want = old[moment].index_select(layer.ranked[key], kept)
                assert torch.equal(new[moment], want)
    held = {id(p) for group in trainee.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainee.model.parameters() if p.requires_grad}


def test_ranked_names_every_tensor_with_a_slice_for_each_rank(layers: dict[str, Adapter]) -> None:
    """Or none: what is left out would keep its old size while the others shrink."""
    for layer in layers.values():
        axes = {
            name: value.shape.index(layer.r)
            for name, value in layer.own_state().items()
            if layer.r in value.shape
        }
        assert layer.ranked in ({}, axes)


def test_it_learns_a_planted_task(config: VariantConfig) -> None:
    settings = section(eval_every=1)
    gentle = type(config).model_validate({"variant": config.variant, "rank": 4, "alpha": 8.0})
    scores = taught(pupil(gentle, settings), settings).scores()
    assert scores[-1] < 0.5 * scores[0]


def test_permuting_ranks_changes_nothing(layers: dict[str, Adapter], config: VariantConfig) -> None:
    promises(config, "exchangeable_ranks")
    scramble(layers.values())
    for layer in layers.values():
        layer.eval()
        x = torch.randn(3, layer.n)
        before, rank = layer(x), layer.rank()
        permute_ranks(layer, torch.tensor([2, 0, 3, 1]))
        assert_close(layer(x), before, rtol=1e-5, atol=1e-6)
        assert layer.rank() == rank


def test_pruned_and_loaded_by_peft_it_is_the_same_model(
    config: VariantConfig, tmp_path: Path
) -> None:
    """Into the pretrained MiniLM, with ranks that differ between modules and one that is 0."""
    promises(config, "low_rank")
    names = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(4)]
    config = config.model_copy(update={"targets": (*names, "bert.pooler.dense"), "rank": 8})
    base = minilm()
    ranks = dict(zip((*names, "bert.pooler.dense"), (3, 8, 1, 5, 8), strict=True))
    layers = injected(base.model, config, ranks, whole=["classifier"])
    scramble(layers.values())
    with torch.no_grad():
        for p in own_parameters(layers[names[0]]):  # the first module dies, whatever the variant
            p.zero_()
        layers[names[0]].scale = 0.0  # and where a start is subtracted, that too
        head = base.model.get_submodule("classifier")
        for p in head.parameters():
            p.add_(torch.randn_like(p))
    pairs = plain(layers)
    if pairs[names[0]].rank:  # LoRA knows no dead ranks
        pairs[names[0]] = pairs[names[0]]._replace(
            A=pairs[names[0]].A[:0], B=pairs[names[0]].B[:, :0]
        )
    assert len({pair.rank for pair in pairs.values()}) > 1
    whole = peft_format.tensors_of({"classifier": head})
    peft_format.write(tmp_path, PeftAdapter(pairs, whole, "minilm", "SEQ_CLS"))

    theirs = peft.PeftModel.from_pretrained(minilm().model, tmp_path).eval()
    rows = models.probe(base.model)
    with torch.no_grad():
        ours = base.model.eval()(**rows).logits
        assert_close(theirs(**rows).logits, ours, rtol=1e-5, atol=1e-5)
    plain_base = minilm().model.eval()(**rows).logits
    assert (ours - plain_base).abs().max() > 0.1  # the adapter does something

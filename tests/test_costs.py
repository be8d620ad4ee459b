"""What a run costs, by counts that no load of the machine can change."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import pytest
import transformers
from planted import Calls
from torch import Tensor

from lorakit import optim, variants
from lorakit import recipe as recipes
from lorakit.data.batching import Encoded, steps
from lorakit.engine import Engine
from lorakit.prepare import Prepared, prepare
from lorakit.progress import Watch
from lorakit.train import backward

LENGTHS = Path(__file__).parent / "data" / "sst2_lengths.json"
"""How many training rows of SST-2 have how many tokens of MiniLM's."""


def test_little_of_a_batch_is_padding_and_few_shapes_are_met() -> None:
    """Of SST-2, over one epoch in batches of 32; batches at random would have half padding.

    Every shape has its kernels compiled.
    """
    counts = {int(length): rows for length, rows in json.loads(LENGTHS.read_text()).items()}
    lengths = [length for length, rows in counts.items() for _ in range(rows)]
    assert len(lengths) == 67_349
    an_epoch = -(-len(lengths) // 32)
    rows = Encoded({"input_ids": [range(length) for length in lengths]}, Tensor(), {"input_ids": 0})
    shapes = [
        rows.batch(numbers).inputs["input_ids"].shape
        for (numbers,) in islice(steps(lengths, 32, 1, seed=0), an_epoch)
    ]
    assert 1 - sum(lengths) / sum(map(prod, shapes)) < 0.13
    assert len(set(shapes)) < 25


def test_no_text_is_tokenized_once_steps_are_taken(
    recipe: Path, lorakit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", "cache")  # nothing that is encoded already
    calls: list[int] = []
    step = 0
    tokenize, tick = transformers.PreTrainedTokenizerBase.__call__, Watch.tick

    def counted(*given: Any, **named: Any) -> Any:
        calls.append(step)
        return tokenize(*given, **named)

    def noted(watch: Watch, number: int) -> None:
        nonlocal step
        step = number
        tick(watch, number)

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "__call__", counted)
    monkeypatch.setattr(Watch, "tick", noted)
    assert lorakit("train", recipe, "train.steps=5", "train.eval_every=2").code == 0
    assert step == 5
    assert 0 in calls  # training rows
    assert not [call for call in calls if call > 2]  # validation rows, when they are first scored


def calls_in_a_step(recipe: Path, *overrides: str) -> tuple[Counter[str], Prepared]:
    prepared = prepare(recipes.load(recipe, list(overrides)))
    layers, loaded, model = prepared.layers, prepared.recipe, prepared.base.model.train()
    kind = variants.get(loaded.adapter.variant)
    controller = kind.controller(layers, loaded.adapter, 100)
    optimizer = optim.adamw(model, layers, loaded.train)
    (batch,) = next(prepared.task.steps(4, 1, seed=0))
    with Calls() as calls:
        backward(model, prepared.task, [batch], 4, controller, Engine())
        Engine().clip(optim.parameters(optimizer), 1.0)
        optimizer.step()
    return calls.counts, prepared


def test_a_step_of_lora_takes_no_more_products_than_it_needs(recipe: Path) -> None:
    """Two blocks of six linears and the pooler, all adapted, and a classifier trained whole.

    An adapted linear is W x + b, A x and B (A x) with the sum; backward the gradients of A and B,
    that of A x, and, where its input needs one, the two parts of the input's. Those of the first
    block that read the embeddings, query, key and value, have no such input. Frozen weights get no
    gradient.
    """
    calls, prepared = calls_in_a_step(recipe)
    adapted, of_embeddings, classifier = len(prepared.layers), 3, 1
    assert adapted == 13
    assert calls["addmm"] == 2 * adapted + classifier
    assert calls["mm"] == 4 * adapted + 2 * (adapted - of_embeddings) + 2 * classifier
    assert calls["bmm"] == 2 * 6  # blocks; scores and their use, and the gradients of both
    assert calls["_fused_adamw_"] == 1
    assert calls["_local_scalar_dense"] <= 3  # numbers read, for which a GPU would be waited for
    assert calls.total() < 1_000


def test_gates_cost_a_few_small_kernels_each(recipe: Path) -> None:
    plain, prepared = calls_in_a_step(recipe)
    gated, _ = calls_in_a_step(recipe, "adapter.variant=sora", "adapter.sparsity.lambda=1e-3")
    assert all(gated[name] == plain[name] for name in ("addmm", "mm", "bmm"))
    assert (gated.total() - plain.total()) / len(prepared.layers) < 10


def test_a_checkpoint_holds_what_is_trained_with_its_moments_and_little_else(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """Three numbers of 4 bytes each; names, shapes, and what the base is known by, are below 800
    bytes for each tensor that is trained and 100 for each of the base.
    """
    assert lorakit("train", recipe, "train.steps=3").code == 0
    folder, prepared = Path("runs/tiny/checkpoints/step-000003"), prepare(recipes.load(recipe, []))
    trained = [p.requires_grad for p in prepared.base.model.parameters()]
    numbers, words = 12 * prepared.trainable(), 800 * sum(trained) + 100 * len(trained)
    assert numbers < sum(path.stat().st_size for path in folder.iterdir()) < numbers + words

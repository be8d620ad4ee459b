"""A step's operations by formula are those that it takes."""

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lorakit import recipe as recipes
from lorakit import variants
from lorakit.engine import Engine
from lorakit.prepare import prepare
from lorakit.train import backward
from roofline import Encoder, Machine, Product, module_of


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ".*layer.0.attention.self.query",
        ".*layer.1.attention.self.value",
        ".*layer.1.attention.output.dense",
        ".*layer.0.intermediate.dense",
        ".*layer.1.output.dense",
        ".*(query|key)",
        "pooler.dense",
    ],
)
def test_the_formula_counts_what_torch_counts(recipe: Path, targets: str) -> None:
    prepared = prepare(recipes.load(recipe, [f'adapter.targets=["{targets}"]', "adapter.rank=3"]))
    model, config = prepared.base.model.train(), prepared.recipe.adapter
    controller = variants.get(config.variant).controller(prepared.layers, config, 10)
    (batch,) = next(prepared.task.steps(4, 1, seed=0))
    with FlopCounterMode(display=False) as counter:
        backward(model, prepared.task, [batch], 4, controller, Engine())
    rows, length = batch.inputs["input_ids"].shape
    adapted = map(module_of, prepared.layers)
    products = Encoder.of(model.config).step(rows, length, 3, adapted)
    assert sum(p.flops for p in products) == counter.get_total_flops()


def test_the_least_time_is_that_of_the_scarcer_of_operations_and_memory() -> None:
    computed, moved = Product(1, 10, 10, 10), Product(5, 100, 1, 1)
    machine = Machine(flops=1000.0, bytes=100.0)
    assert machine.least([computed], 1) == pytest.approx(3.0)  # 300 bytes; 2,000 operations take 2
    assert machine.least([moved], 2) == pytest.approx(5 * 201 * 2 / 100)
    assert Machine(100.0, 1e9).least([computed, moved], 2) == pytest.approx(20 + 10)

"""Switches that are for GPUs: on a CPU they take the same steps, or are refused."""

from collections.abc import Callable
from functools import partialmethod
from itertools import count
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import pytest
import torch
from stopped import metrics
from torch import nn

from lorakit.data.batching import ahead


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_model_takes_the_same_steps(
    recipe: Path, lorakit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is torch's own; what makes machine code of it takes minutes and is left out."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    for folder, compiled in (("plain", False), ("compiled", True)):
        settings = (f"train.compile={str(compiled).lower()}", f"output_dir=runs/{folder}")
        answer = lorakit("train", recipe, "model.dropout=0.0", "train.log_every=1", *settings)
        assert answer.code == 0, answer.err
        assert bool(graphs) == compiled
    plain, compiled = (
        [row["loss"] for row in metrics(Path("runs") / name)] for name in ("plain", "compiled")
    )
    assert len(plain) == 7
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_compiled_layers_cannot_be_compacted(recipe: Path, lorakit: Callable[..., Any]) -> None:
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.05, compact: true}")
    answer = lorakit("train", recipe, *sora, "train.compile=true")
    assert answer.code == 2
    assert "layers can be compacted only where train.compile is off" in answer.err
    assert not Path("runs/tiny").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it")
def test_tf32_is_refused_where_no_gpu_has_it(recipe: Path, lorakit: Callable[..., Any]) -> None:
    answer = lorakit("train", recipe, "model.precision=tf32")
    assert answer.code == 2
    assert "model.precision: tf32" in answer.err
    assert not Path("runs/tiny").exists()


def test_products_of_fp32_are_not_rounded(recipe: Path, lorakit: Callable[..., Any]) -> None:
    torch.set_float32_matmul_precision("medium")
    assert lorakit("train", recipe, "--dry-run").code == 0
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_next_is_made_while_one_is_used_and_by_another_thread() -> None:
    made, makers = [Event() for _ in range(4)], set()

    def making() -> Any:
        for number in count():
            makers.add(current_thread().name)
            made[number].set()
            yield number

    stream = ahead(making())
    assert next(stream) == 0
    assert made[1].wait(timeout=10)
    assert [next(stream), next(stream)] == [1, 2]
    stream.close()
    assert not any(name == current_thread().name for name in makers)


def test_who_makes_the_next_computes_alone_and_all_others_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        stream = ahead(torch.get_num_threads() for _ in count())
        assert [next(stream), next(stream), torch.get_num_threads()] == [1, 1, 2]
        stream.close()
    finally:
        torch.set_num_threads(before)


def test_a_fault_in_making_comes_where_the_item_would_have() -> None:
    def making() -> Any:
        yield 0
        raise LookupError("row 7")

    stream = ahead(making())
    assert next(stream) == 0
    with pytest.raises(LookupError, match="row 7"):
        next(stream)

"""The bench of scale times what it says it does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import MINILM
from transformers import AutoTokenizer

import scaling
import scaling_report
from lorakit import recipe as recipes
from lorakit.models import resolve
from stepping import Runner


def test_a_text_has_its_length_exactly_and_no_two_are_the_same(tmp_path: Path) -> None:
    scaling.write_texts(tmp_path / "rows.csv", 50, 24)
    _, *lines = (tmp_path / "rows.csv").read_text().splitlines()
    texts = [line.partition(",")[0] for line in lines]
    ids = AutoTokenizer.from_pretrained(resolve(MINILM))(texts)["input_ids"]
    assert {len(row) for row in ids} == {24}
    assert len(set(texts)) == 50


@pytest.mark.parametrize("point", [point for axis in scaling.AXES.values() for point in axis])
def test_every_point_is_a_recipe(tmp_path: Path, point: Any) -> None:
    loaded = recipes.load(scaling.RECIPE, scaling.overrides(point, tmp_path))
    assert (loaded.adapter.rank, loaded.train.batch_size) == (point.rank, point.batch)
    assert loaded.task.max_length == point.length
    assert loaded.model.dropout is None


def test_gates_that_are_dead_from_the_start_are_compacted_away(tmp_path: Path) -> None:
    (pruned,) = (point for point in scaling.AXES["pruned"] if point.dead)
    assert pruned.dead == pytest.approx(0.7 * pruned.rank, abs=0.5)
    prepared = scaling.prepared_at(pruned._replace(length=8, batch=2), tmp_path)
    Runner(prepared, 2).take(2)
    shapes = {tuple(layer.get_parameter("A").shape) for layer in prepared.layers.values()}
    assert {rank for rank, _ in shapes} == {scaling.LIVE}


def step(axis: str, value: str, seconds: float, **more: Any) -> dict[str, Any]:
    """A row as `scaling.steps` gives it."""
    counts = {"modules": 37, "tokens": 1000, "products": [[5, 1000, 1000, 1000]], "itemsize": 2}
    return {"axis": axis, "value": value, "seconds": [seconds] * 3, **counts, **more}


def run(count: int, cached: bool, seconds: float) -> dict[str, Any]:
    """A row as `scaling.rows` gives it."""
    return {
        "axis": "rows",
        "value": count,
        "cached": cached,
        "cpu_s": seconds,
        "first_step_s": seconds - 2,
        "peak_mb": 1200.0,
    }


MEASURED = [
    {"axis": "machine", "flops": 1e11, "bytes": 1e9},
    *(step(axis, value, 0.5) for axis in ("length", "rank", "batch") for value in ("8", "16")),
    step("modules", "the last query", 0.2, modules=1),
    step("modules", "all linears", 0.5),
    *(run(count, cached, 9.0) for count in (1000, 10**6) for cached in (False, True)),
    step("pruned", "LoRA", 0.5),
    step("pruned", "SoRA", 0.5),
    step("pruned", "SoRA", 0.6),
    {"axis": "machine", "flops": 5e10, "bytes": 1e15},
]


def written_to(folder: Path) -> Path:
    """A file of them."""
    path = folder / "measured.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MEASURED))
    return path


def test_of_a_point_measured_twice_the_last_numbers_are_told(tmp_path: Path) -> None:
    measured = scaling_report.newest(written_to(tmp_path))
    assert len(measured) == len(MEASURED) - 3
    assert scaling_report.ratio(measured) == "1.20 (1.20-1.20)"
    lines = scaling_report.tables(measured).splitlines()
    assert "| 16 | 37 | 500 (500-500) | 2,000 | 10 | 20 | 5.0 x |" in lines
    assert "| 1,000,000 | 9 | 9 | 7 | 7 | 1,200 | 1,200 |" in lines


def test_the_picture_has_every_axis_and_asks_no_other_host_for_anything(tmp_path: Path) -> None:
    measured = scaling_report.newest(written_to(tmp_path))
    scaling_report.draw(measured, tmp_path / "scaling.svg")
    svg = (tmp_path / "scaling.svg").read_text()
    for name in (*scaling_report.TITLES.values(), "training rows", "1,000k", "measured"):
        assert f">{name}<" in svg
    assert not re.search(r'(href|src)="(?!#)', svg)
    assert "url(http" not in svg

"""The bench times what runs: the loop itself, in turns, on the same rows."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.testing import assert_close

from lorakit import variants

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_variants.py"


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture
def setting(bench: SimpleNamespace, recipe: Path) -> Any:
    return bench.Setting(recipe, None, "fp32", rank=2)


def test_a_run_taken_in_portions_is_the_run(bench: SimpleNamespace, setting: Any) -> None:
    whole, parted = (bench.runner("sora", setting, 10) for _ in range(2))
    assert len(whole.take(6)) == 5
    assert [len(parted.take(3)) for _ in range(2)] == [2, 2]
    assert whole.trainee.progress.step == parted.trainee.progress.step == 6
    for name, layer in whole.trainee.layers.items():
        assert_close(parted.trainee.layers[name].own_state(), layer.own_state())


def test_variants_take_turns_and_every_step_but_the_first_of_a_turn_is_timed(
    bench: SimpleNamespace, setting: Any
) -> None:
    seconds = bench.times(["lora", "sora"], setting, rounds=3, block=2)
    assert {name: [len(turn) for turn in turns] for name, turns in seconds.items()} == {
        "lora": [2, 2, 2],
        "sora": [2, 2, 2],
    }
    assert all(second > 0 for turns in seconds.values() for turn in turns for second in turn)


def test_ratios_are_of_the_same_round(bench: SimpleNamespace) -> None:
    assert bench.ratios([[2.0, 4.0], [9.0, 9.0]], [[1.0, 1.0], [9.0, 9.0]]) == [3.0, 1.0]


def test_a_row_tells_medians_quartiles_and_whether_time_and_memory_meet_the_target(
    bench: SimpleNamespace, setting: Any
) -> None:
    slow = {"lora": [[1.0]] * 4, "sora": [[1.0], [1.04], [1.04], [1.2]]}
    peaks = {"lora": 100, "sora": 104}
    row = rows_with(bench, slow, peaks, setting)["sora"]
    assert row["time"] == pytest.approx(1.04)
    assert row["time_quartiles"] == pytest.approx([1.03, 1.08])
    assert (row["memory"], row["target"], row["met"]) == (1.04, 1.05, True)
    assert not rows_with(bench, slow, {**peaks, "sora": 106}, setting)["sora"]["met"]
    assert rows_with(bench, slow, peaks, setting)["lora"]["met"] is None


def rows_with(bench: SimpleNamespace, seconds: Any, peaks: Any, setting: Any) -> dict[str, Any]:
    """The rows that these measurements give."""
    inside = bench.measured.__globals__
    told = {"times": lambda *_: seconds, "peak": lambda name, *_: peaks[name]}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in told.items():
            patch.setitem(inside, name, function)
        return {row["variant"]: row for row in bench.measured(list(seconds), setting, 4, 1, 1)}


def test_a_target_is_set_for_variants_that_there_are(bench: SimpleNamespace) -> None:
    assert set(bench.TARGETS) <= set(variants.names())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_a_process_of_its_own(bench: SimpleNamespace, setting: Any) -> None:
    assert 0 < bench.peak("lora", setting, 2) < 1e9


def test_the_table_has_a_line_for_each_row(bench: SimpleNamespace, setting: Any) -> None:
    seconds = {"lora": [[1.0]] * 4, "sora": [[2.0]] * 4}
    rows = rows_with(bench, seconds, {"lora": 2, "sora": 2}, setting)
    cells = [list(column.cells) for column in bench.table(list(rows.values())).columns]
    assert cells[0] == ["lora", "sora"]
    assert cells[3] == ["1.000", "2.000"]
    assert cells[-1] == ["", "no"]
    assert all(re.fullmatch(r"[\d.]+ - [\d.]+", cell) for cell in cells[4])

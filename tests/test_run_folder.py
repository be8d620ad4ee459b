"""Which checkpoints of a run stay."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.run_folder import staying
from lorakit.timetable import Timetable

SPARED: frozenset[int] = frozenset()


def kept(steps: Sequence[int], count: int, spared: frozenset[int] = SPARED) -> list[int]:
    """With something due at every tenth step of a hundred."""
    table = Timetable(100, 1, None, 10)
    return sorted(staying(steps, count, lambda step: table.due(step, table.save_every), spared))


@pytest.mark.parametrize(
    ("steps", "count", "spared", "stay"),
    [
        ([], 1, {}, []),
        ([10], 1, {}, [10]),
        ([10, 20, 30], 2, {}, [20, 30]),
        ([10, 20, 30], 5, {}, [10, 20, 30]),
        ([10, 20, 30, 40], 1, {10, 30}, [10, 30, 40]),
        ([10, 20, 30, 40], 2, {20, 30}, [20, 30, 40]),
        ([10, 17], 1, {}, [10, 17]),  # stopped at 17, where nothing is due
        ([10, 17, 20], 1, {}, [20]),
        ([10, 17, 20], 1, {17}, [17, 20]),
        ([7, 9, 13], 1, {7}, [7, 13]),
        ([90, 99, 100], 2, {}, [90, 100]),
    ],
)
def test_the_last_the_newest_that_were_due_and_those_that_are_spared_stay(
    steps: list[int], count: int, spared: set[int], stay: list[int]
) -> None:
    assert kept(steps, count, frozenset(spared)) == stay


STEPS = st.sets(st.integers(1, 100)).map(sorted)
COUNTS = st.integers(1, 12)


@given(STEPS, COUNTS, st.frozensets(st.integers(1, 100)))
def test_neither_the_last_nor_one_that_is_spared_is_ever_removed(
    steps: list[int], count: int, spared: frozenset[int]
) -> None:
    stay = kept(steps, count, spared)
    assert {*steps[-1:], *(spared & {*steps})} <= {*stay} <= {*steps}
    assert len(stay) <= count + 1 + len(spared)


@given(STEPS, COUNTS, st.frozensets(st.integers(1, 100)))
def test_thinned_out_at_every_step_or_once_the_same_are_left(
    steps: list[int], count: int, spared: frozenset[int]
) -> None:
    left: list[int] = []
    for step in steps:
        left = kept([*left, step], count, spared)
    assert left == kept(steps, count, spared)


@given(STEPS, COUNTS, st.integers(1, 99))
def test_a_stop_where_nothing_is_due_is_forgotten_at_the_next_step_that_is(
    steps: list[int], count: int, stop: int
) -> None:
    with_stop = sorted({*steps, stop, 100})
    if stop % 10:
        without = sorted({*steps, 100} - {stop})
        assert kept(with_stop, count) == kept(without, count)

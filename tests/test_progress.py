"""What a person sees of long work, on a terminal and where its words go into a file."""

import io
import logging

import pytest
from rich.console import Console

from lorakit import progress
from lorakit.pace import paced
from lorakit.progress import Watch
from lorakit.timetable import Timetable


def watch(terminal: bool) -> tuple[Watch, io.StringIO]:
    file = io.StringIO()
    return Watch(Console(file=file, force_terminal=terminal, width=100)), file


def test_work_shows_a_bar_on_a_terminal_that_is_gone_when_it_is_done() -> None:
    seen, file = watch(terminal=True)
    with seen:
        for number in paced(range(4), "rows tokenized", 4):
            assert (seen.bars is not None) == (number > 0)
        assert seen.bars is None
        for _ in paced([3, 4], "rows tokenized", 7, size=int):
            pass
    assert "rows tokenized" in file.getvalue()
    assert "4/4" not in file.getvalue()  # it was taken away instead


def test_bars_of_work_within_a_run_stand_below_that_of_the_run() -> None:
    seen, _ = watch(terminal=True)
    with seen:
        seen.begin(2, Timetable(10, 1, None, None), start_ranks=8)
        seen.tick(3)
        for _ in paced(range(4), "validation rows answered", 4):
            pass
        assert seen.bars is not None
        assert [(task.description, task.completed) for task in seen.bars.tasks] == [("training", 3)]
    assert seen.bars is None


def test_a_bar_is_closed_where_work_ends_in_a_fault() -> None:
    def work() -> None:
        with seen:
            for number in paced(range(4), "rows tokenized", 4):
                if number == 2:
                    raise LookupError

    seen, _ = watch(terminal=True)
    with pytest.raises(LookupError):
        work()
    assert seen.bars is None
    with seen:  # and another can be opened
        for _ in paced(range(2), "rows tokenized", 2):
            pass


def test_elsewhere_it_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, file = watch(terminal=False)
    with seen:
        for _ in paced(range(3), "rows tokenized", 3):
            pass
        assert file.getvalue() == ""  # it took no ten seconds
        seen.said -= 60
        for _ in paced(range(2), "rows answered", 2):
            pass
        assert file.getvalue() == ""  # nor did this, a minute later
        monkeypatch.setattr(progress, "EVERY", 0.0)
        for _ in paced([1000, 1000, 1000], "rows tokenized", 3000, size=int):
            pass
    assert file.getvalue() == "· 2,000 of 3,000 rows tokenized\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_the_second_of_two_processes_is_silent(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(progress, "EVERY", 0.0)
    seen, file = watch(terminal)
    with seen:
        for _ in paced(range(3), "rows tokenized", 3):
            pass
    assert file.getvalue() == ""


def test_nobody_need_listen() -> None:
    assert not logging.getLogger("lorakit").handlers
    assert list(paced("abc", "letters", 3)) == ["a", "b", "c"]

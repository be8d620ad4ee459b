"""Clocks that jump, and machines that differ: a run goes on, and says what is other."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
from conftest import Answer
from stopped import metrics, stop_after

from lorakit.disk import sweep
from lorakit.run_folder import find, newest

Lorakit = Callable[..., Answer]
TINY = Path("runs/tiny")
DAY, YEAR = 86_400, 365 * 86_400
OFTEN = ("train.save_every=2", "train.eval_every=3", "train.log_every=1", "adapter.dropout=0.1")


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is a day behind at one look, and a year ahead at the next."""
    now, nanoseconds, jumps = time.time, time.time_ns, cycle((-DAY, YEAR))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() + next(jumps) * 10**9)
    assert time.time() + YEAR < time.time()


def files(run: Path) -> dict[str, bytes]:
    """All that its checkpoints are."""
    found = (run / "checkpoints").rglob("*")
    return {str(path.relative_to(run)): path.read_bytes() for path in found if path.is_file()}


def test_a_run_whose_wall_clock_jumps_ends_the_same_and_tells_no_mad_rate(
    recipe: Path, lorakit: Lorakit, request: pytest.FixtureRequest
) -> None:
    assert lorakit("train", recipe, *OFTEN).code == 0
    calm = TINY.rename("runs/calm")
    request.getfixturevalue("jumping")
    assert lorakit("train", recipe, *OFTEN).code == 0
    stop_after(TINY, 2)
    answer = lorakit("train", TINY, "--resume")
    assert answer.code == 0, answer.err
    assert files(TINY) == files(calm)
    assert metrics(TINY) == metrics(calm)
    rows = [json.loads(line) for line in (TINY / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["samples_per_s"] < 1e6 for row in rows if "ranks" in row)


def test_the_newest_checkpoint_is_of_the_latest_step_whatever_the_clock_said(
    recipe: Path, lorakit: Lorakit
) -> None:
    assert lorakit("train", recipe, *OFTEN).code == 0
    (TINY / "checkpoints" / "best").unlink()
    for step, when in ((2, 100 * YEAR), (4, 0), (6, DAY)):
        folder = TINY / "checkpoints" / f"step-{step:06d}"
        for path in (*folder.iterdir(), folder):
            os.utime(path, (when, when))
    assert newest(TINY)[0] == find(TINY) == TINY / "checkpoints" / "step-000006"


@pytest.mark.parametrize("when", [0, 100 * YEAR], ids=["1970", "2070"])
def test_what_is_swept_away_does_not_hang_on_its_date(tmp_path: Path, when: int) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    left = tmp_path / f".last.{gone.pid}.tmp"
    written = tmp_path / f".best.{os.getpid()}.tmp"
    for path in (left, written):
        path.touch()
        os.utime(path, (when, when))
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [written]


def test_a_run_goes_on_where_cores_and_versions_are_others_and_says_so(
    recipe: Path, lorakit: Lorakit
) -> None:
    assert lorakit("train", recipe, *OFTEN).code == 0
    done = files(TINY)
    path = TINY / "environment.json"
    told = json.loads(path.read_text())
    packages = {**told["packages"], "torch": "2.0.0", "peft": None}
    path.write_text(
        json.dumps({**told, "packages": packages, "threads": 64, "cores": 64, "device": "cuda"})
    )
    stop_after(TINY, 2)
    answer = lorakit("train", TINY, "--resume")
    assert answer.code == 0
    assert files(TINY) == done
    said = [line for line in answer.err.splitlines() if "the last digits of results" in line]
    assert [line.split()[1] for line in said] == ["torch", "device", "threads"]
    assert "threads 64 there, 1 here: the last digits of results may differ" in answer.err

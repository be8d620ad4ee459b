"""A disk that is full, read-only or gone under way: one message; what was written stays whole."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer

from lorakit import checkpoint, run, run_folder
from lorakit import recipe as recipes
from lorakit.disk import write_text
from lorakit.errors import FolderError

Lorakit = Callable[..., Answer]
OFTEN = ("train.save_every=1", "train.eval_every=null")


class Screen:
    """Calls something once a step is over."""

    def __init__(self, step: int, call: Callable[[], object]) -> None:
        self.step, self.call = step, call

    def tick(self, step: int) -> None:
        if step == self.step:
            self.call()

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_: None


def mount(options: str, folder: Path) -> bool:
    """Mounts a file system in memory, where that is allowed."""
    if not sys.platform.startswith("linux") or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 160 kB, on which a checkpoint or two of the tiny model fit."""
    folder = tmp_path / "small"
    folder.mkdir()
    if not mount("size=160k", folder):
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def whole_checkpoints(folder: Path) -> list[Path]:
    """All there are; each must be as it was written."""
    found = sorted((folder / "checkpoints").glob("step-*"))
    for one in found:
        checkpoint.verify(one)
    return found


def leftovers(folder: Path) -> list[Path]:
    return list(folder.rglob("*.tmp"))


def same(one: Path, other: Path) -> bool:
    """Whether two runs have ended in the same tensors."""
    folders = [run_folder.find(path, "last") for path in (one, other)]
    files = [f"{part}.safetensors" for part in ("adapter", "head", "state")]
    return all((folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in files)


def test_a_full_disk_ends_in_a_message_and_the_run_goes_on_once_there_is_room(
    small: Path, recipe: Path, lorakit: Lorakit
) -> None:
    target = small / "run"
    answer = lorakit("train", recipe, *OFTEN, f"output_dir={target}")
    assert (answer.code, answer.out) == (2, "")
    assert f"error: {target}" in answer.err
    assert "No space left on device" in answer.err
    assert "Traceback" not in answer.err
    before = whole_checkpoints(target)
    assert before
    assert leftovers(small) == []

    assert mount("remount,size=20m", small)
    assert lorakit("train", target, "--resume").code == 0
    assert lorakit("train", recipe, *OFTEN).code == 0
    assert len(whole_checkpoints(target)) == 6 > len(before)
    assert same(target, Path("runs/tiny"))


def test_no_room_for_the_run_folder_leaves_nothing(
    small: Path, recipe: Path, lorakit: Lorakit
) -> None:
    (small / "filler").write_bytes(bytes(158 * 1024))
    answer = lorakit("train", recipe, f"output_dir={small}/run")
    assert answer.code == 2
    assert "No space left on device" in answer.err
    assert [path.name for path in small.iterdir()] == ["filler"]


@pytest.mark.parametrize("command", ["prune", "merge"])
def test_no_room_for_an_export_leaves_nothing(
    small: Path, recipe: Path, lorakit: Lorakit, command: str
) -> None:
    assert lorakit("train", recipe).code == 0
    answer = lorakit(command, "runs/tiny", "--out", small / "out")
    assert answer.code == 2, answer.err
    assert "No space left on device" in answer.err
    assert list(small.iterdir()) == []


def test_a_disk_that_becomes_read_only_ends_in_a_message(
    small: Path, recipe: Path, lorakit: Lorakit
) -> None:
    assert mount("remount,size=20m", small)
    target = small / "run"
    loaded = _loaded(recipe, *OFTEN, f"output_dir={target}")
    with pytest.raises(FolderError) as caught:
        run.run(loaded, resume=False, screen=_screen(3, lambda: mount("remount,ro", small)))
    assert "Read-only file system" in str(caught.value)
    assert len(whole_checkpoints(target)) == 3
    assert mount("remount,rw", small)
    assert lorakit("train", target, "--resume").code == 0


def test_no_room_for_tokens_tells_how_to_keep_them_elsewhere(
    small: Path, recipe: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small / "filler").write_bytes(bytes(150 * 1024))
    monkeypatch.setenv("LORAKIT_CACHE", str(small))
    answer = lorakit("train", recipe)
    assert (answer.code, answer.out) == (2, "")
    assert (
        "No space left on device.\n  Tokens may be kept elsewhere: LORAKIT_CACHE=DIR" in answer.err
    )
    assert not Path("runs").exists()
    assert leftovers(small) == []


def test_a_result_that_could_not_be_written_is_refused_before_it_is_scored(
    small: Path, recipe: Path, lorakit: Lorakit
) -> None:
    assert lorakit("train", recipe).code == 0
    assert mount("remount,ro", small)
    for options in (("eval", "--output-path"), ("predict", "a film", "--out")):
        command, *rest = options
        answer = lorakit(command, "runs/tiny", *rest, small / "out.csv")
        assert (answer.code, answer.out) == (2, "")
        assert (
            answer.err
            == f"error: {small}/out.csv cannot be made: no permission to write in "
            + (f"{small}.\n")
        )


def test_a_small_file_that_cannot_be_written_is_told_by_its_own_name(small: Path) -> None:
    assert mount("remount,ro", small)
    with pytest.raises(FolderError, match=r"small/last cannot be written: Read-only"):
        write_text(small / "last", "step-000002\n")


@pytest.mark.parametrize("step", [2, 3], ids=["before a checkpoint", "before a row"])
def test_a_folder_that_is_removed_under_way_ends_in_a_message(recipe: Path, step: int) -> None:
    gone = Path("runs/tiny")
    with pytest.raises(FolderError, match=r"runs/tiny.* cannot be written: No such"):
        run.run(_loaded(recipe, *OFTEN), False, _screen(step, lambda: shutil.rmtree(gone)))


def test_checkpoints_that_are_removed_under_way_are_written_anew(recipe: Path) -> None:
    folder = Path("runs/tiny/checkpoints")
    run.run(_loaded(recipe, *OFTEN), False, _screen(3, lambda: shutil.rmtree(folder)))
    assert [path.name for path in whole_checkpoints(folder.parent)] == [
        f"step-{step:06d}" for step in (4, 5, 6)
    ]


def _screen(step: int, call: Callable[[], object]) -> Any:
    return Screen(step, call)


def _loaded(path: Path, *overrides: str) -> Any:
    return recipes.load(path, overrides)

"""Runs that are stopped, killed, or met by another; checkpoints that have changed on disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from lorakit import recipe, run
from lorakit.checkpoint import left_out
from lorakit.disk import locked, own_folder, sweep, whole_folder, write_text
from lorakit.errors import FolderError, Stopped
from lorakit.run_folder import find, last_good, newest

Lorakit = Callable[..., Any]
TINY = Path("runs/tiny")


class Screen:
    """Raises a signal once a step is over, and keeps what it is told."""

    def __init__(self, number: int | None = None, step: int = 0) -> None:
        self.number, self.step = number, step
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)

    def begin(self, *_: object) -> None:
        pass

    def tick(self, step: int) -> None:
        if step == self.step and self.number is not None:
            signal.raise_signal(self.number)

    def log(self, row: dict[str, Any]) -> None:
        pass


@pytest.fixture(autouse=True)
def _as_in_a_terminal() -> Iterator[None]:
    """In a shell's background SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def finished(recipe: Path, lorakit: Lorakit) -> Path:
    """A run with checkpoints at steps 2, 4 and 6."""
    answer = lorakit("train", recipe, "train.save_every=2", "train.eval_every=null")
    assert answer.code == 0, answer.err
    return TINY


def files(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    parts = ("adapter", "head", "state")
    return {
        f"{part}/{key}": value
        for part in parts
        for key, value in load_file(folder / f"{part}.safetensors").items()
    }


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.tmp")]


# stopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_stop_finishes_its_step_saves_and_goes_on_as_if_it_had_not(
    recipe: Path, lorakit: Lorakit, number: signal.Signals
) -> None:
    whole = lorakit("train", recipe, "adapter.dropout=0.1", "output_dir=runs/whole")
    assert whole.code == 0, whole.err
    loaded = _loaded(recipe, "adapter.dropout=0.1")
    with pytest.raises(Stopped, match=r"stopped at step 5 of 6.*lorakit train runs/tiny --resume"):
        run.run(loaded, resume=False, screen=Screen(number, step=4))
    assert find(TINY, "last").name == "step-000005"
    assert lorakit("train", TINY, "--resume").code == 0
    assert_close(files(find(TINY, "last")), files(find(Path("runs/whole"), "last")), rtol=0, atol=0)
    assert _told(TINY) == _told(Path("runs/whole"))


def _loaded(path: Path, *overrides: str) -> Any:
    return recipe.load(path, overrides)


def _told(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key != "samples_per_s"} for row in rows]


def test_a_signal_after_the_last_step_is_too_late_to_stop_anything(recipe: Path) -> None:
    outcome = run.run(_loaded(recipe), resume=False, screen=Screen(signal.SIGTERM, step=6))
    assert outcome is not None
    assert outcome.step == 6


def test_the_second_signal_is_as_deadly_as_ever() -> None:
    with run.told_to_stop() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with run.told_to_stop() as caught:
        signal.raise_signal(signal.SIGINT)
    assert not caught


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_as_a_shell_has_it(
    recipe: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    from lorakit.progress import Watch

    tick = Watch.tick

    def tick_and_stop(self: Any, step: int) -> None:
        tick(self, step)
        if step == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(Watch, "tick", tick_and_stop)
    answer = lorakit("train", recipe)
    assert answer.code == code
    assert "go on with: lorakit train runs/tiny --resume" in answer.err
    assert "error" not in answer.err


@pytest.mark.parametrize(
    ("command", "within"),
    [
        (("prune", TINY, "--out", "out"), "lorakit.export._reloaded"),
        (("merge", TINY, "--out", "out"), "lorakit.merge._reloaded"),
        (("predict", TINY, "a film", "--out", "out.csv"), "lorakit.predict.longer"),
        (("eval", TINY, "--output-path", "out.json"), "lorakit.tasks.TextTask.score"),
        (("train", "recipe.yaml", "output_dir=out"), "lorakit.data.encoding.longer"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_where_nothing_is_trained_a_signal_ends_the_command_and_nothing_is_half_written(
    finished: Path,
    lorakit: Lorakit,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[object, ...],
    within: str,
) -> None:
    monkeypatch.setenv("LORAKIT_CACHE", "cache")  # nothing that is encoded already
    before = {str(path) for path in Path().rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr(within, lambda *_, **__: signal.raise_signal(signal.SIGINT))
        answer = lorakit(*command)
    assert (answer.code, answer.out) == (130, "")
    assert answer.err.endswith("interrupted; nothing is left half-written\n")
    new = {str(path) for path in Path().rglob("*")} - before
    assert not [path for path in new if not path.startswith("cache") or path.endswith(".tmp")]


# numbers


def test_a_run_without_a_finite_loss_names_the_last_good_checkpoint(
    recipe: Path, lorakit: Lorakit
) -> None:
    answer = lorakit("train", recipe, "train.lr=1e30", "train.clip=null", "train.save_every=1")
    assert answer.code == 2
    assert "the loss is nan" in answer.err
    good = find(TINY, "last")
    assert f"The last good checkpoint is {good}." in answer.err
    assert all(value.isfinite().all() for value in load_file(good / "state.safetensors").values())


def test_a_run_of_steps_left_out_is_shown_until_it_is_hopeless(
    recipe: Path, lorakit: Lorakit
) -> None:
    wild = ("train.lr=1e30", "train.clip=null", "train.steps=30", "train.eval_every=null")
    answer = lorakit("train", recipe, *wild, "train.non_finite=skip", "train.log_every=1")
    assert answer.code == 2, answer.err
    assert "as in the 9 steps before" in answer.err
    assert "loss none" in answer.err
    assert [row["loss"] for row in _told(TINY)][-9:] == [None] * 9
    assert _told(TINY)[-1]["skipped"] == 9


def test_of_steps_left_out_the_last_good_checkpoint_is_the_one_before_them(
    recipe: Path, lorakit: Lorakit
) -> None:
    """The first step of this rate is taken, and no later one has a finite loss."""
    wild = ("train.lr=1e30", "train.clip=null", "train.steps=30", "train.log_every=1")
    given = ("train.eval_every=3", "train.save_every=1", "train.non_finite=skip")
    answer = lorakit("train", recipe, *wild, *given)
    assert answer.code == 2
    skipped = {f.name: left_out(f) for f in sorted((TINY / "checkpoints").glob("step-*"))}
    first = next(iter(skipped))
    assert list(skipped.values()) == list(range(10))
    assert f"The last good checkpoint is {TINY / 'checkpoints' / first}." in answer.err
    shutil.rmtree(TINY / "checkpoints" / first)
    assert last_good(TINY) == TINY / "checkpoints" / max(skipped)  # none is better than another
    (last_good(TINY) / "state.safetensors").write_bytes(b"")
    assert last_good(TINY) == TINY / "checkpoints" / sorted(skipped)[-2]
    resumed = lorakit("train", TINY, "--resume")  # what was never scored is no score
    assert (resumed.code, "cannot be read" in resumed.err) == (2, False), resumed.err


def test_a_loss_that_runs_away_is_told_once(recipe: Path, lorakit: Lorakit) -> None:
    given = ("train.lr=3", "train.log_every=1", "train.warmup=0", "train.schedule=constant")
    answer = lorakit("train", recipe, *given)
    assert answer.code == 0, answer.err
    losses = [row["loss"] for row in _told(TINY) if "ranks" in row]
    assert max(losses) > 1.5 * losses[0]
    assert answer.err.count("a lower train.lr may help") == 1
    assert "may help" not in lorakit("train", recipe, "output_dir=runs/calm").err


# two at once


def test_two_runs_do_not_write_into_one_folder(finished: Path, lorakit: Lorakit) -> None:
    with locked(finished):
        answer = lorakit("train", finished, "--resume")
    assert answer.code == 2
    assert "another process trains into it" in answer.err
    assert lorakit("train", finished, "--resume").code == 0


def test_the_lock_of_a_process_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from lorakit.disk import locked\n"
    code += "with locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        with pytest.raises(FolderError, match="another process"), locked(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
        with locked(tmp_path):
            pass


def test_a_folder_of_a_process_alone_is_removed_by_the_next_that_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, signal, sys; from pathlib import Path; from lorakit.disk import own_folder\n"
    code += "with own_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, "-c", code, tmp_path]).returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    with own_folder(tmp_path) as mine, own_folder(tmp_path) as other:
        assert {path for path in tmp_path.iterdir()} == {mine, other}
    assert leftovers(tmp_path) == []


def test_what_a_killed_process_left_is_swept_away_and_what_a_living_one_writes_is_not(
    tmp_path: Path,
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    (tmp_path / f".step-000004.{gone.pid}.tmp").mkdir()
    (tmp_path / f".best.{gone.pid}.tmp").touch()
    kept = {f".last.{os.getpid()}.tmp", ".mine.tmp", "notes.tmp"}
    for name in kept:
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    (tmp_path / f".pruned.{gone.pid}.tmp").mkdir()
    with whole_folder(tmp_path / "pruned"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "pruned"}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, set[str]]]:
    """What is synced from now on, in order, each with the names that are beside it by then."""
    found, sync = [], os.fsync

    def told(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        found.append((path, {each.name for each in path.parent.iterdir()}))
        sync(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("Linux tells what is synced")
    monkeypatch.setattr(os, "fsync", told)
    return found


def test_a_small_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(
    tmp_path: Path, synced: list[tuple[Path, set[str]]]
) -> None:
    write_text(tmp_path / "last", "step-000002\n")
    (file, beside), (folder, _) = synced
    assert (file, folder) == (tmp_path / f".last.{os.getpid()}.tmp", tmp_path)
    assert "last" not in beside


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_its_rows_of_metrics_too(
    recipe: Path, lorakit: Lorakit, synced: list[tuple[Path, set[str]]]
) -> None:
    answer = lorakit("train", recipe, "train.save_every=null", "train.eval_every=null")
    assert answer.code == 0, answer.err
    folder = find(TINY, "last").absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    paths = [path for path, _ in synced]
    at = paths.index(temporary)
    assert {path.name for path in paths[:at] if path.parent == temporary} == {
        path.name for path in folder.iterdir()
    }
    assert paths.index(TINY.absolute() / "metrics.jsonl") < at
    assert folder.name not in synced[at][1]
    assert paths[at + 1] == folder.parent


# not as it was written


@pytest.mark.parametrize(
    "name",
    [
        *("adapter.safetensors", "head.safetensors", "state.safetensors"),
        *("state.json", "recipe.yaml", "manifest.json"),
    ],
)
def test_a_byte_changed_anywhere_or_cut_off_is_found_and_the_file_named(
    finished: Path, name: str
) -> None:
    folder = find(finished, "last")
    path = folder / name
    content = path.read_bytes()
    step = max(1, len(content) // 40)
    for at in [*range(0, len(content), step), len(content) - 1]:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refused(finished, name)
        path.write_bytes(content[:at])
        refused(finished, name)
    path.unlink()
    refused(finished, name)
    path.write_bytes(content)
    assert find(finished, "last") == folder


def refused(finished: Path, name: str) -> None:
    """A change in the manifest may make it name a file that never was."""
    says = "is not as it was written" if name == "manifest.json" else name
    with pytest.raises(FolderError, match=says) as error:
        find(finished, "last")
    assert "Whole are: 2, 4; choose by --checkpoint." in str(error.value)


@pytest.mark.parametrize("pointer", ["best", "last"])
def test_a_pointer_to_nowhere_is_refused(finished: Path, pointer: str) -> None:
    path = finished / "checkpoints" / pointer
    for content in (b"", b"step-000005\n", b"../../elsewhere\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(FolderError, match=rf"{pointer} names .*among: 2, 4, 6"):
            find(finished, pointer)


def test_a_run_whose_last_checkpoint_is_broken_goes_on_from_the_one_before(
    finished: Path, lorakit: Lorakit
) -> None:
    before, last = files(find(finished, "last")), find(finished, "last")
    path = last / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    answer = lorakit("train", finished, "--resume")
    assert answer.code == 0
    assert "state.safetensors" in answer.err
    assert "resumed at step 4 of 6" in answer.err
    assert_close(files(find(finished, "last")), before, rtol=0, atol=0)
    assert (last.parent / "broken-step-000006").is_dir()


def test_what_was_put_aside_is_not_in_the_way_of_what_breaks_later(
    finished: Path, lorakit: Lorakit
) -> None:
    for times in (1, 2, 3):
        (find(finished, "last") / "state.safetensors").write_bytes(bytes(times))
        answer = lorakit("train", finished, "--resume")
        assert answer.code == 0, answer.err
        assert "resumed at step 4 of 6" in answer.err
    aside = sorted((finished / "checkpoints").glob("broken-*"))
    assert [path.name.removeprefix("broken-step-000006") for path in aside] == ["", "-2", "-3"]
    assert [(path / "state.safetensors").stat().st_size for path in aside] == [1, 2, 3]


@pytest.mark.parametrize("where", ["/dev/zero", "../step-000002/state.json", "..", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused_and_not_followed(
    finished: Path, where: str
) -> None:
    """/dev/zero has no end."""
    path = find(finished, "last") / "manifest.json"
    known = json.loads(path.read_text())
    known["files"][where] = {"bytes": 0, "sha256": ""}
    path.write_text(json.dumps(known))
    with pytest.raises(FolderError, match=r"is no file of this folder|: no file"):
        find(finished, "last")


def test_a_device_or_a_folder_in_the_place_of_a_file_is_refused_by_its_name(
    finished: Path,
) -> None:
    folder = find(finished, "last")
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").symlink_to("/dev/zero")
    (folder / "head.safetensors").unlink()
    (folder / "head.safetensors").mkdir()
    with pytest.raises(FolderError) as error:
        find(finished, "last")
    for name in ("adapter", "head"):
        assert f"  {name}.safetensors: no file\n" in str(error.value)


def test_a_run_that_was_killed_within_its_last_save_is_put_in_order(
    recipe: Path, lorakit: Lorakit
) -> None:
    """After the checkpoint itself: pointers are old, and what is not to be kept is there still."""
    given = ("train.save_every=2", "train.eval_every=2", "train.keep_last=1")
    kept, screen = TINY / "checkpoints", Screen()
    was = Path("was")
    screen.tick = lambda step: shutil.copytree(kept, was) if step == 4 else None
    run.run(_loaded(recipe, *given), resume=False, screen=screen)
    done = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    shutil.copytree(was, kept, dirs_exist_ok=True)
    assert (kept / "last").read_text() == "step-000004\n"
    answer = lorakit("train", TINY, "--resume")
    assert answer.code == 0, answer.err
    assert "resumed at step 6 of 6" in answer.err
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == done


@pytest.mark.parametrize(
    "line", ['{"step": 4, "lo', "5", "[]", '{"stop": 4}', '{"step": []}', "\xff", "[" * 5000]
)
def test_a_line_of_metrics_that_a_disk_has_broken_is_dropped(
    finished: Path, lorakit: Lorakit, line: str
) -> None:
    path = finished / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_bytes("".join([*whole[:1], f"{line}\n", *whole[1:]]).encode("latin-1"))
    assert lorakit("train", finished, "--resume").code == 0
    assert path.read_text() == "".join(whole)


def test_a_run_without_a_whole_checkpoint_says_so_and_touches_nothing(
    finished: Path, lorakit: Lorakit
) -> None:
    for path in finished.glob("checkpoints/step-*/state.json"):
        path.write_text("{}")
    answer = lorakit("train", finished, "--resume")
    assert answer.code == 2
    assert "has no whole checkpoint: 3 faults" in answer.err
    assert len(list(finished.glob("checkpoints/step-*"))) == 3


def test_a_checkpoint_that_was_written_but_not_yet_pointed_to_is_gone_on_from(
    finished: Path,
) -> None:
    (finished / "checkpoints" / "last").write_text("step-000002\n")
    assert newest(finished) == (finished / "checkpoints" / "step-000006", ())


def test_a_recipe_that_was_changed_in_the_run_folder_is_not_gone_on_with(
    finished: Path, lorakit: Lorakit
) -> None:
    path = finished / "recipe.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 0.002"))
    answer = lorakit("train", finished, "--resume")
    assert answer.code == 2
    assert "step-000006 was started with another recipe: 1 fault" in answer.err


def test_only_the_newest_and_the_best_are_kept_where_the_recipe_says_so(
    recipe: Path, lorakit: Lorakit
) -> None:
    short = ("train.save_every=1", "train.eval_every=2", "train.keep_last=2")
    assert lorakit("train", recipe, *short).code == 0
    kept = {path.name for path in (TINY / "checkpoints").glob("step-*")}
    assert {"step-000005", "step-000006", find(TINY, "best").name} == kept
    assert not leftovers(TINY)


BESTS = {"save_every": 4, "eval_every": 2, "keep_last": 1, "keep_best": 3, "steps": 14, "lr": 0.01}


def steps_kept(checkpoints: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*")}


def test_the_best_are_kept_as_many_as_the_recipe_says(recipe: Path, lorakit: Lorakit) -> None:
    given = [f"train.{key}={value}" for key, value in BESTS.items()]
    assert lorakit("train", recipe, *given).code == 0
    rows = [json.loads(line) for line in (TINY / "metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    ranked = sorted(scores, key=lambda step: (-scores[step], step))
    assert len({*scores.values()}) < len(scores)  # some are equal
    assert steps_kept(TINY / "checkpoints") == {*ranked[:3], 14}
    assert find(TINY).name == f"step-{ranked[0]:06d}"
    assert not leftovers(TINY)


@pytest.mark.parametrize("step", [7, 13])
def test_a_run_that_was_stopped_keeps_the_checkpoints_it_would_have_kept(
    recipe: Path, lorakit: Lorakit, step: int
) -> None:
    """At a step at which nothing is due."""
    given = [f"train.{key}={value}" for key, value in (BESTS | {"keep_last": 2}).items()]
    assert lorakit("train", recipe, *given).code == 0
    whole = TINY.rename("runs/whole") / "checkpoints"
    with pytest.raises(Stopped):
        run.run(_loaded(recipe, *given), False, Screen(signal.SIGINT, step - 1))
    assert step in steps_kept(TINY / "checkpoints")
    assert lorakit("train", TINY, "--resume").code == 0
    assert steps_kept(TINY / "checkpoints") == steps_kept(whole)
    for pointer in ("best", "last"):
        assert (TINY / "checkpoints" / pointer).read_text() == (whole / pointer).read_text()


def test_the_ends_of_stages_are_kept_always(recipe: Path, lorakit: Lorakit) -> None:
    stages = ("sparsity.schedule=linear", "sparsity.levels=3", "sparsity.lambda=1")
    short = ("train.save_every=1", "train.eval_every=null", "train.keep_last=1")
    given = ["adapter.variant=sora", *(f"adapter.{key}" for key in stages), *short]
    assert lorakit("train", recipe, *given).code == 0
    kept = {path.name for path in (TINY / "checkpoints").glob("step-*")}
    assert (
        {"step-000002", "step-000004", "step-000006"}
        <= kept
        <= {find(TINY).name} | {*("step-000002", "step-000004", "step-000006")}
    )

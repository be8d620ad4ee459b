"""A run that was stopped anywhere goes on as if it had not been: bit for bit, on a CPU."""

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import writers
import yaml
from conftest import Answer
from safetensors.torch import load_file, save_file
from stopped import metrics, stop_after
from torch import Tensor

from lorakit import manifest, variants
from lorakit.data import rows as stored_rows

Lorakit = Callable[..., Answer]
RUN = Path("runs/tiny")


class Case(NamedTuple):
    """What is trained, and after which steps it is stopped."""

    adapter: Mapping[str, Any]
    stops: tuple[int, ...]
    train: Mapping[str, Any] = {}
    other: Mapping[str, Mapping[str, Any]] = {}
    """Keys of other sections."""


TRAIN = {
    "steps": 12,
    "batch_size": 5,
    "accumulate": 2,
    "lr": 1e-2,
    "eval_every": 4,
    "log_every": 5,
    "save_every": 3,
    "patience": 50,
}
"""60 rows, 10 in a step: the first epoch ends after step 6, and step 3 is in its midst. No row is
logged where it is saved."""
GATES = {"lambda": 3.0, "gate_lr": 0.1}
OWN: Mapping[str, Mapping[str, Any]] = {"sora": {"sparsity": GATES}}
"""Settings that make something happen within a few steps."""
STAGES = {**GATES, "schedule": "linear", "levels": 3, "dense": 0.4}
KEEP = {"keep": 0.5, "compact": True}
PARAMETERS = {"keep": 0.3, "of": "parameters"}
OUTGROWN = {"xi": 0.12, "gate_init": "normal", "compact": True}
REFERENCE = {"mode": "reference", "xi": 0.05, "gate_init": "normal", "l1": 1.0}
ADAM = {"metric": "adam", "lambda": 1e-4}
TARGETS = {"keep": 0.75, "bits": 30.0}
WORDS = {"also_train": ["word_embeddings"]}
"""Large enough for moments in 8 bits."""
LONG = {"steps": 28, "save_every": 7, "eval_every": 10}

WRITING = {"name": "causal-lm", "max_length": 64}
ANSWERS = {"model": {"name": "llama"}, "data": {"train": "answers.jsonl"}}
"""A model that writes, and its rows; both are made for the cases that name them."""

CASES = {
    **{name: Case({"variant": name, **OWN.get(name, {})}, (3, 6)) for name in variants.names()},
    "sora in each stage": Case({"variant": "sora", "sparsity": STAGES}, (3, 6, 9)),
    "blora to targets": Case({"variant": "blora", "gates": TARGETS}, (14,), LONG),
    "sora as its authors' code": Case({"variant": "sora", "sparsity": REFERENCE}, (3,)),
    "sora by Adam's scale": Case({"variant": "sora", "sparsity": ADAM}, (3,)),
    "sora to a share of parameters": Case({"variant": "sora", "sparsity": PARAMETERS}, (14,), LONG),
    "sora compacted by a threshold": Case({"variant": "sora", "sparsity": OUTGROWN}, (14,), LONG),
    "sora compacted": Case({"variant": "sora", "sparsity": KEEP}, (14, 21), LONG),
    "patience pending": Case({"variant": "lora"}, (6,), {"patience": 2, "lr": 1e-9, "steps": 16}),
    **{
        f"moments of {name}": Case({"variant": "lora", **WORDS}, (3,), {"optimizer": name})
        for name in ("adamw8bit", "paged_adamw8bit", "paged_adamw32bit")
    },
    "over a base in 4 bits": Case(
        {"variant": "lora"}, (6,), {"optimizer": "adamw8bit"}, {"model": {"quantize": "nf4"}}
    ),
    "answers, packed": Case(
        {"variant": "lora"}, (3,), {}, {**ANSWERS, "task": {**WRITING, "packing": True}}
    ),
    "answers, apart": Case({"variant": "lora"}, (3,), {}, {**ANSWERS, "task": WRITING}),
    "steps of one batch": Case({"variant": "lora"}, (9,), {"accumulate": 1, "clip": None}),
}


@pytest.fixture
def train(recipe: Path, lorakit: Lorakit) -> Callable[[Case], Path]:
    """Trains a case to its end; gives the run, which has a checkpoint of every step."""

    def uninterrupted(case: Case) -> Path:
        given = yaml.safe_load(recipe.read_text())
        given["adapter"] = {"rank": 4, "dropout": 0.1, **case.adapter}
        given["train"] = {**TRAIN, **case.train}
        for section, keys in case.other.items():
            given[section] = {**given[section], **keys}
        if case.other.get("model", {}).get("name") == "llama":
            writers.llama(Path("llama"))
            lines = [json.dumps(row) + "\n" for row in writers.rows(60)]
            Path("answers.jsonl").write_text("".join(lines))
        recipe.write_text(yaml.safe_dump(given))
        answer = lorakit("train", recipe)
        assert answer.code == 0, answer.err
        return RUN.rename("runs/whole")

    return uninterrupted


def cut(whole: Path, step: int) -> Path:
    """The run as a kill soon after the checkpoint of `step` would have left it."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(whole, RUN)
    stop_after(RUN, step)
    return RUN


def ends(run: Path) -> dict[str, Any]:
    """All that a run leaves: tensors and progress of its last step, its best step, its metrics."""
    name = (run / "checkpoints" / "last").read_text().strip()
    folder, best = run / "checkpoints" / name, run / "checkpoints" / "best"
    tensors: dict[str, Tensor] = {}
    for part in ("adapter", "head", "state"):
        tensors |= load_file(folder / f"{part}.safetensors")
    return {
        "last": name,
        "best": best.read_text() if best.exists() else None,
        "state": (folder / "state.json").read_text(),
        "metrics": metrics(run),
        "tensors": {key: (tuple(t.shape), t.numpy().tobytes()) for key, t in tensors.items()},
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    found = [key for key in ("last", "best", "state", "metrics") if one[key] != other[key]]
    mine, theirs = one["tensors"], other["tensors"]
    return found + [
        key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)
    ]


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_ends_like_the_uninterrupted_one(
    train: Callable[[Case], Path], lorakit: Lorakit, name: str
) -> None:
    case = CASES[name]
    whole = train(case)
    wanted = ends(whole)
    for step in case.stops:
        answer = lorakit("train", cut(whole, step), "--resume")
        assert answer.code == 0, answer.err
        assert f"resumed at step {step} of" in answer.err
        assert differences(ends(RUN), wanted) == [], f"stopped after step {step}"


def test_a_run_whose_rows_are_beyond_memory_goes_on_too(
    train: Callable[[Case], Path], lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ends(train(CASES["lora"]))
    monkeypatch.setattr(stored_rows, "IN_MEMORY", 0)
    monkeypatch.setenv("LORAKIT_CACHE", "cache")  # nothing that is encoded already
    answer = lorakit("train", cut(Path("runs/whole"), 3), "--resume")
    assert answer.code == 0, answer.err
    assert differences(ends(RUN), wanted) == []


def test_what_the_cases_are_meant_to_meet_does_happen(train: Callable[[Case], Path]) -> None:
    """Ranks are compacted away between two stops, patience ends a run, rates rise anew."""
    whole = train(CASES["sora compacted"])
    sizes = [
        sum(t.numel() for t in load_file(folder / "adapter.safetensors").values())
        for folder in sorted((whole / "checkpoints").glob("step-*"))
    ]
    assert sizes[0] > sizes[1] > sizes[-1]
    shutil.rmtree(whole)
    last = train(CASES["moments of adamw8bit"]) / "checkpoints" / "step-000012"
    words = "optimizer/bert.embeddings.word_embeddings.weight.state1"
    assert load_file(last / "state.safetensors")[words].dtype == torch.uint8
    shutil.rmtree(whole)
    assert ends(train(CASES["patience pending"]))["last"] == "step-000012"
    shutil.rmtree(whole)
    rows = ends(train(CASES["sora in each stage"]))["metrics"]
    rates = [row["lr"] for row in rows if "lr" in row]
    assert any(later > earlier for earlier, later in pairwise(rates))


@pytest.fixture
def stopped(train: Callable[[Case], Path]) -> Callable[[str], Path]:
    """Trains a case and cuts it after step 6; gives the checkpoint."""

    def after_six(name: str) -> Path:
        return cut(train(CASES[name]), 6) / "checkpoints" / "step-000006"

    return after_six


def reseal(folder: Path) -> None:
    """Makes the manifest of a checkpoint true again."""
    (folder / manifest.NAME).unlink()
    manifest.write(folder)


@pytest.mark.parametrize("part", ["optimizer", "controller", "random"])
def test_the_comparison_sees_a_state_that_is_older(
    stopped: Callable[[str], Path], lorakit: Lorakit, part: str
) -> None:
    """A control of the tests above: their equality needs each part of the state."""
    folder = stopped("adalora")
    now = load_file(folder / "state.safetensors")
    before = load_file(folder.with_name("step-000003") / "state.safetensors")
    mixed = {key: before[key] if key.startswith(f"{part}/") else t for key, t in now.items()}
    save_file(mixed, folder / "state.safetensors")
    reseal(folder)
    answer = lorakit("train", RUN, "--resume")
    assert answer.code == 0, answer.err
    assert differences(ends(RUN), ends(Path("runs/whole")))


def test_the_comparison_sees_progress_that_is_another(
    stopped: Callable[[str], Path], lorakit: Lorakit
) -> None:
    folder = stopped("patience pending")
    wanted = ends(Path("runs/whole"))
    state = json.loads((folder / "state.json").read_text())
    for key, other in (("stale", 1), ("loss", 0.0), ("items", 3), ("best", [[6, 1e9]])):
        cut(Path("runs/whole"), 6)
        progress = {**state["progress"], key: other}
        assert progress != state["progress"], key
        (folder / "state.json").write_text(json.dumps({**state, "progress": progress}))
        reseal(folder)
        answer = lorakit("train", RUN, "--resume")
        assert answer.code == 0, answer.err
        assert differences(ends(RUN), wanted), key


@pytest.mark.parametrize("part", ["optimizer", "controller", "random"])
def test_a_state_that_lacks_a_part_is_refused(
    stopped: Callable[[str], Path], lorakit: Lorakit, part: str
) -> None:
    folder = stopped("adalora")
    tensors = load_file(folder / "state.safetensors")
    left = {key: t for key, t in tensors.items() if not key.startswith(f"{part}/")}
    save_file(left, folder / "state.safetensors")
    reseal(folder)
    answer = lorakit("train", RUN, "--resume")
    assert (answer.code, answer.out) == (2, "")
    assert f"{folder}/state.safetensors does not fit this run" in answer.err

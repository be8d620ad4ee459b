"""A run that was stopped anywhere goes on as if it had not been: bit for bit, on a CPU.

Each situation is a few settings and the steps at which the run is cut; each variant is trained in
each once, undisturbed, and goes on from every cut. Controls drop each piece of state in turn.
"""

import json
import shutil
import signal
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import writers
import yaml
from conftest import Answer, jsonl
from safetensors.torch import load_file, save_file
from stopped import metrics, number, stop_after
from torch import Tensor

from lorakit import manifest, variants
from lorakit.data import rows as stored_rows
from lorakit.engine import Engine

Lorakit = Callable[..., Answer]
Train = Callable[[str, str], Path]
Progress = Mapping[str, Any]
RUN = Path("runs/tiny")
TENSORS = ("adapter", "head", "state")

TRAIN = {
    "steps": 12,
    "batch_size": 5,
    "accumulate": 2,
    "lr": 1e-2,
    "eval_every": 4,
    "log_every": 5,
    "save_every": 3,
}
"""60 rows, 10 in a step: the first epoch ends after step 6, and steps 3 and 9 are in the midst of
one. No row is logged where it is saved."""
OWN: Mapping[str, Mapping[str, Any]] = {
    "adalora": {"budget": {"warmup": 0.3, "final": 0.3}},
    "blora": {"gates": {"warmup": 0.4, "freeze": 0.3, "lambda_bits": 0.1, "lambda_ranks": 0.1}},
    "sora": {"sparsity": {"lambda": 3.0, "gate_lr": 0.1}},
}
"""Settings that make something happen within a few steps. Of those that have phases, each is in
its first at step 3, in its second at 6, in its last at 9."""


def at(*steps: int) -> Callable[[Progress], bool]:
    return lambda progress: progress["step"] in steps


class Situation(NamedTuple):
    """What a run is in when it is stopped."""

    cut: Callable[[Progress], bool]
    """At which of its checkpoints, by its progress there."""
    adapter: Mapping[str, Any] = {}
    """A variant without such settings has nothing of the kind, and is left out."""
    train: Mapping[str, Any] = {}
    other: Mapping[str, Mapping[str, Any]] = {}
    """Keys of other sections."""

    def fits(self, variant: str) -> bool:
        known = variants.get(variant).config.model_fields.keys()
        return self.adapter.get("variant", variant) == variant and self.adapter.keys() <= known


STAGES = {"lambda": 3.0, "gate_lr": 0.1, "schedule": "linear", "levels": 3, "dense": 0.4}
OUTGROWN = {"xi": 0.12, "gate_init": "normal", "compact": True}
REFERENCE = {"mode": "reference", "xi": 0.05, "gate_init": "normal", "l1": 1.0}
LONG = {"steps": 28, "save_every": 7, "eval_every": 10}
WAIT = {"patience": 2, "lr": 1e-9, "steps": 20, "eval_every": 2, "save_every": 2, "accumulate": 1}
WILD = {"lr": 1e30, "clip": None, "non_finite": "skip", "steps": 8, "save_every": 4}
ANSWERS = {"model": {"name": "llama"}, "data": {"train": "answers.jsonl"}}
WRITING = {"name": "causal-lm", "max_length": 64}
NF4 = {"name": "llama", "quantize": "nf4"}
WORDS = {"variant": "lora", "also_train": ["word_embeddings"]}
"""Large enough for moments in 8 bits, which know of no variant."""

SITUATIONS = {
    "in mid-epoch, at its end, in each phase": Situation(at(3, 6, 9, 12)),
    "patience pending": Situation(lambda progress: progress["stale"] == 1, {}, WAIT),
    "steps left out": Situation(lambda progress: progress["skipped"] > 0, {}, WILD),
    "packed answers over a base in 4 bits": Situation(
        at(9), {}, {}, {**ANSWERS, "model": NF4, "task": {**WRITING, "packing": True}}
    ),
    "in each stage of a schedule": Situation(at(3, 6, 9), {"sparsity": STAGES}),
    "compacted to a share": Situation(
        at(14, 21), {"sparsity": {"keep": 0.5, "compact": True}}, LONG
    ),
    "compacted by a threshold": Situation(at(14), {"sparsity": OUTGROWN}, LONG),
    "to a share of parameters": Situation(
        at(14), {"sparsity": {"keep": 0.3, "of": "parameters"}}, LONG
    ),
    "to targets of ranks and bits": Situation(
        at(14), {"gates": {"keep": 0.75, "bits": 30.0}}, LONG
    ),
    "answers apart, all of it just rewritten": Situation(
        at(8), {"sparsity": {"keep": 0.5}}, {**LONG, "save_every": 4}, {**ANSWERS, "task": WRITING}
    ),
    "as SoRA's authors' code": Situation(at(3), {"sparsity": REFERENCE}),
    "by Adam's scale": Situation(at(3), {"sparsity": {"metric": "adam", "lambda": 1e-4}}),
    "answers apart": Situation(at(3), {"variant": "lora"}, {}, {**ANSWERS, "task": WRITING}),
    **{
        f"moments of {name}": Situation(at(3), WORDS, {"optimizer": name})
        for name in ("adamw8bit", "paged_adamw8bit", "paged_adamw32bit")
    },
}
PLAIN = next(iter(SITUATIONS))
CASES = [(s, v) for s in SITUATIONS for v in variants.names() if SITUATIONS[s].fits(v)]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes, its rows, and every run that was trained to its end."""
    folder = tmp_path_factory.mktemp("kept")
    writers.llama(folder / "llama")
    jsonl(folder, writers.rows(60), "answers.jsonl")
    return folder


@pytest.fixture
def train(recipe: Path, kept: Path, lorakit: Lorakit) -> Train:
    """Trains a variant in a situation to its end, once; gives the run, with all its checkpoints."""
    for name in ("llama", "answers.jsonl"):
        Path(name).symlink_to(kept / name)

    def uninterrupted(name: str, variant: str) -> Path:
        run, situation = kept / f"{name}, {variant}", SITUATIONS[name]
        if not run.exists():
            given = yaml.safe_load(recipe.read_text())
            own = {"variant": variant, "rank": 4, "dropout": 0.1, **OWN.get(variant, {})}
            given["adapter"] = {**own, **situation.adapter}
            given["train"] = {**TRAIN, **situation.train}
            for section, keys in situation.other.items():
                given[section] = {**given[section], **keys}
            recipe.write_text(yaml.safe_dump(given))
            answer = lorakit("train", recipe)
            assert answer.code == 0 or "AdaLoRA ended with" in answer.err, answer.err
            (RUN / "code").write_text(str(answer.code))
            RUN.rename(run)
        return run

    return uninterrupted


def cuts(whole: Path, situation: Situation) -> list[int]:
    """The steps of the checkpoints it is cut at."""
    told = {number(path): progress(path) for path in checkpoints(whole)}
    return [step for step in told if situation.cut(told[step])]


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def progress(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())["progress"]
    return found


def cut(whole: Path, step: int) -> Path:
    """The run as a kill soon after the checkpoint of `step` would have left it; that checkpoint."""
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(whole, RUN)
    stop_after(RUN, step)
    return RUN / "checkpoints" / f"step-{step:06d}"


def resume(lorakit: Lorakit) -> str:
    """Goes on to the end, which must be as good or bad as the undisturbed one; what was said."""
    answer = lorakit("train", RUN, "--resume")
    assert answer.code == int((RUN / "code").read_text()), answer.err
    return answer.err


def differences(whole: Path, step: int) -> list[str]:
    """What the run that went on after `step` has left that `whole` has not, or otherwise: rows,
    pointers, and every byte of every later checkpoint.
    """
    found = [] if metrics(RUN) == metrics(whole) else ["metrics.jsonl"]
    found += [name for name in ("best", "last") if pointer(RUN, name) != pointer(whole, name)]
    for theirs in checkpoints(whole):
        if number(theirs) > step:
            mine = RUN / "checkpoints" / theirs.name
            found += [
                str(mine / name)
                for name, told in digests(theirs).items()
                if digests(mine).get(name) != told
            ]
    return found


def pointer(run: Path, name: str) -> str | None:
    path = run / "checkpoints" / name
    return path.read_text() if path.exists() else None


def digests(checkpoint: Path) -> dict[str, Any]:
    """Of every file; none where there is no such checkpoint."""
    path = checkpoint / manifest.NAME
    found: dict[str, Any] = json.loads(path.read_text())["files"] if path.exists() else {}
    return found


@pytest.mark.parametrize(("name", "variant"), CASES, ids=map(", ".join, CASES))
def test_a_resumed_run_ends_like_the_uninterrupted_one(
    train: Train, lorakit: Lorakit, name: str, variant: str
) -> None:
    whole = train(name, variant)
    steps = cuts(whole, SITUATIONS[name])
    assert steps
    for step in steps:
        cut(whole, step)
        assert f"resumed at step {step} of" in resume(lorakit)
        assert differences(whole, step) == [], f"stopped after step {step}"


@pytest.mark.parametrize("variant", variants.names())
def test_a_run_that_is_told_to_stop_between_two_batches_of_a_step_goes_on(
    train: Train, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    whole = train(PLAIN, variant)
    cut(whole, 3)
    backward, calls = Engine.backward, count(1)

    def told(self: Engine, loss: Tensor) -> None:
        backward(self, loss)
        if next(calls) == 3:  # the first of the two of step 5
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "backward", told)
        assert lorakit("train", RUN, "--resume").code == 143
    assert pointer(RUN, "last") == "step-000005\n"
    resume(lorakit)
    assert differences(whole, 3) == []


@pytest.mark.parametrize("variant", variants.names())
def test_a_run_whose_rows_are_beyond_memory_goes_on_too(
    train: Train, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    whole = train(PLAIN, variant)
    cut(whole, 9)
    monkeypatch.setattr(stored_rows, "IN_MEMORY", 0)
    monkeypatch.setenv("LORAKIT_CACHE", "cache")  # nothing that is encoded already
    resume(lorakit)
    assert differences(whole, 9) == []


# controls: the equality above needs each piece of what a checkpoint holds

CONTROLS = [
    *((PLAIN, variant) for variant in variants.names()),
    ("to targets of ranks and bits", "blora"),
    ("to a share of parameters", "sora"),
]


def is_seen(lorakit: Lorakit, whole: Path, step: int) -> bool:
    """Whether a run that was tampered with ends otherwise, or is refused."""
    answer = lorakit("train", RUN, "--resume")
    return str(answer.code) != (whole / "code").read_text() or bool(differences(whole, step))


def pieces(checkpoint: Path) -> set[tuple[str, str]]:
    """What kinds of tensors there are, by file: `state`, `optimizer/exp_avg`."""
    return {
        (part, kind(key))
        for part in TENSORS
        for key in load_file(checkpoint / f"{part}.safetensors")
    }


def kind(key: str) -> str:
    """A tensor's name without that of its layer."""
    where, slash, name = key.rpartition("/")
    return f"{where}{slash}{name.rpartition('.')[2]}"


def reset(path: Path, piece: str, before: Mapping[str, Tensor]) -> None:
    """Gives one kind of tensor other values: those `before`, or where there were none, any."""
    known = {
        key: before.get(key, ~t if t.dtype == torch.bool else t + 1) if kind(key) == piece else t
        for key, t in load_file(path).items()
    }
    save_file(known, path)
    reseal(path.parent)


def reseal(checkpoint: Path) -> None:
    """Makes the manifest true again."""
    (checkpoint / manifest.NAME).unlink()
    manifest.write(checkpoint)


@pytest.mark.parametrize(("name", "variant"), CONTROLS, ids=map(", ".join, CONTROLS))
def test_the_comparison_sees_every_tensor_that_is_not_put_back(
    train: Train, lorakit: Lorakit, name: str, variant: str
) -> None:
    """Each where it first is: plain LoRA's, then a variant's own, then those of its targets."""
    whole, *plainer = (
        train(*case) for case in [(name, variant), *{(PLAIN, "lora"), (PLAIN, variant)}]
    )
    before, *_, last = checkpoints(whole)
    step = max(step for step in cuts(whole, SITUATIONS[name]) if step < number(last))
    known = {piece for run in plainer if run != whole for piece in pieces(checkpoints(run)[-1])}
    for part, piece in sorted(pieces(last) - known):
        path = cut(whole, step) / f"{part}.safetensors"
        reset(path, piece, load_file(before / path.name))
        if not is_seen(lorakit, whole, step):
            cut(whole, step)
            reset(path, piece, {})
            assert is_seen(lorakit, whole, step), (part, piece)


def test_the_comparison_sees_every_number_of_progress_that_is_not_put_back(
    train: Train, lorakit: Lorakit
) -> None:
    seen = set()
    for name in ("patience pending", "steps left out"):
        whole = train(name, "lora")
        step = cuts(whole, SITUATIONS[name])[0]
        told = progress(cut(whole, step))
        for key in told.keys() - seen:
            path = cut(whole, step) / "state.json"
            other = [] if key == "best" else told[key] + 1
            state = json.loads(path.read_text())
            path.write_text(json.dumps({**state, "progress": {**told, key: other}}))
            reseal(path.parent)
            if is_seen(lorakit, whole, step):
                seen.add(key)
    assert seen == told.keys()


@pytest.mark.parametrize("part", ["optimizer", "controller", "random"])
def test_a_state_that_lacks_a_part_is_refused(train: Train, lorakit: Lorakit, part: str) -> None:
    path = cut(train(PLAIN, "adalora"), 6) / "state.safetensors"
    left = {k: t for k, t in load_file(path).items() if not k.startswith(f"{part}/")}
    save_file(left, path)
    reseal(path.parent)
    answer = lorakit("train", RUN, "--resume")
    assert (answer.code, answer.out) == (2, "")
    assert f"{path} does not fit this run" in answer.err


QUERY = "optimizer/bert.encoder.layer.0.attention.self.query.A"


@pytest.mark.parametrize(
    ("key", "given", "says"),
    [
        ("exp_avg", None, "query.A: no exp_avg"),
        ("step", None, "query.A: no step"),
        ("exp_avg_sq", torch.zeros(2, 2), "query.A: exp_avg_sq is (2, 2), the parameter (4, 16)"),
        ("", None, "query.A: none"),
        ("x.exp_avg", torch.zeros(2, 2), "query.A.x: not trained"),
    ],
)
def test_moments_that_a_state_lacks_are_named(
    train: Train, lorakit: Lorakit, key: str, given: Tensor | None, says: str
) -> None:
    path = cut(train(PLAIN, "lora"), 6) / "state.safetensors"
    known = load_file(path)
    left = {k: t for k, t in known.items() if not k.startswith(f"{QUERY}.{key}".rstrip("."))}
    changed = {**known, f"{QUERY}.{key}": given} if given is not None else left
    assert changed.keys() != known.keys() or given is not None
    save_file(changed, path)
    reseal(path.parent)
    answer = lorakit("train", RUN, "--resume")
    assert (answer.code, answer.out) == (2, "")
    assert f"{path} does not fit this run: moments of the optimizer: 1 fault" in answer.err
    assert says in answer.err


def test_a_run_whose_first_step_was_left_out_goes_on_without_moments(
    recipe: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, calls = Engine.backward, count(1)

    def wild(self: Engine, loss: Tensor) -> None:
        first = next(calls) == 1
        backward(self, loss * float("nan") if first else loss)
        if first:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "backward", wild)
        assert lorakit("train", recipe, "train.non_finite=skip").code == 143
    state = load_file(RUN / "checkpoints" / "step-000001" / "state.safetensors")
    assert not any(key.startswith("optimizer/") for key in state)
    answer = lorakit("train", RUN, "--resume")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("name", [*(f"{part}.safetensors" for part in TENSORS), "recipe.yaml"])
def test_a_checkpoint_that_never_had_a_file_is_refused(
    train: Train, lorakit: Lorakit, name: str
) -> None:
    folder = cut(train(PLAIN, "lora"), 3)
    (folder / name).unlink()
    reseal(folder)
    answer = lorakit("train", RUN, "--resume")
    assert (answer.code, answer.out) == (2, "")
    assert str(folder / name) in answer.err


@pytest.mark.parametrize("text", ["[]", '{"packages": null}', "{", None])
def test_where_the_environment_of_the_start_is_no_more_the_run_goes_on(
    train: Train, lorakit: Lorakit, text: str | None
) -> None:
    whole = train(PLAIN, "lora")
    cut(whole, 9)
    path = RUN / "environment.json"
    path.write_text(text) if text else path.unlink()
    assert "the environment of its start cannot be read" in resume(lorakit)
    assert differences(whole, 9) == []


def test_a_run_without_its_rows_of_metrics_is_refused_and_left_as_it_is(
    train: Train, lorakit: Lorakit
) -> None:
    checkpoint = cut(train(PLAIN, "lora"), 9)
    (RUN / "metrics.jsonl").unlink()
    answer = lorakit("train", RUN, "--resume")
    assert answer.code == 2
    assert f"{RUN / 'metrics.jsonl'} cannot be read" in answer.err
    assert checkpoint.exists()

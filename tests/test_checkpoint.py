"""What a run leaves on disk, and how it comes back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import pupil, section
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lorakit import checkpoint, manifest, recipe
from lorakit.checkpoint import meta
from lorakit.disk import whole_folder, write_text
from lorakit.errors import FolderError
from lorakit.run_folder import find, newest_run
from lorakit.trained import open_trained
from lorakit.variants.lora import LoRAConfig


@pytest.fixture
def run(recipe: Path, lorakit: Callable[..., Any]) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6, evaluated at 2, 4 and 6."""
    answer = lorakit("train", recipe, "train.eval_every=2")
    assert answer.code == 0, answer.err
    return Path("runs/tiny")


def test_a_run_folder_holds_what_its_docstring_says(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    step = {f"{part}.safetensors" for part in ("adapter", "head", "state")}
    step |= {"state.json", "recipe.yaml", "manifest.json"}
    wanted = {"recipe.yaml", "environment.json", "metrics.jsonl"}
    wanted |= {"checkpoints/best", "checkpoints/last"}
    wanted |= {f"checkpoints/{folder.name}/{file}" for folder in steps(run) for file in step}
    assert files == wanted
    assert {"step-000003", "step-000006"} <= {folder.name for folder in steps(run)}


def steps(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))


def test_a_checkpoint_holds_nothing_of_the_base(run: Path) -> None:
    names = set(load_file(steps(run)[0] / "adapter.safetensors"))
    assert all(name.endswith((".A", ".B")) for name in names)
    assert len(names) == 2 * (2 * 6 + 1)  # two blocks of six linears, and the pooler
    assert set(load_file(steps(run)[0] / "head.safetensors")) == {
        "classifier.weight",
        "classifier.bias",
    }


def test_the_scores_of_a_checkpoint_are_those_of_its_step_and_none_where_it_was_not_evaluated(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """A row of a step has a loss as well: that of its training rows."""
    given = ("train.log_every=1", "train.eval_every=2", "train.save_every=1")
    assert lorakit("train", recipe, *given).code == 0
    rows = map(json.loads, Path("runs/tiny/metrics.jsonl").read_text().splitlines())
    scored = {row.pop("step"): row for row in rows if "ranks" not in row}
    for folder in steps(Path("runs/tiny")):
        found = meta(folder)
        assert found.scores == scored.get(found.step, {})


def test_the_resolved_recipe_in_the_folder_rebuilds_the_run(run: Path) -> None:
    restored = recipe.restore(run)
    assert restored.output_dir == "runs/tiny"
    assert restored.train.eval_every == 2
    assert restored.train.clip == 1.0  # a default, written out


def test_the_environment_tells_versions_and_hardware_and_nothing_private(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "environment.json").read_text()
    told = json.loads(text)
    assert told["packages"]["torch"] == torch.__version__
    assert {"python", "device", "cores", "commit", "processes"} <= told.keys()
    assert str(Path.home()) not in text
    assert str(Path.cwd()) not in text


def test_best_else_last_is_taken_and_any_step_can_be_asked_for(run: Path) -> None:
    folder = run / "checkpoints"
    best = (folder / "best").read_text().strip()
    assert find(run).name == best
    assert find(run, "best").name == best
    assert find(run, "last").name == "step-000006"
    assert find(run, "3").name == "step-000003"
    assert find(folder / "step-000003").name == "step-000003"
    (folder / "best").unlink()
    assert find(run).name == "step-000006"


@pytest.mark.parametrize(
    ("which", "says"), [("5", "no checkpoint '5'"), ("bets", "no checkpoint 'bets'")]
)
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(
    run: Path, which: str, says: str
) -> None:
    with pytest.raises(FolderError, match=rf"{says}.*Steps here: .*3.*6"):
        find(run, which)


def test_what_is_neither_run_nor_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no run and no checkpoint"):
        find(tmp_path)
    with pytest.raises(FolderError, match="nothing of that name"):
        find(tmp_path / "nowhere")


def test_best_points_to_the_step_with_the_best_score(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = {row["step"]: row["accuracy"] for row in rows if "accuracy" in row}
    assert set(scored) == {2, 4, 6}
    first_best = max(scored, key=lambda step: (scored[step], -step))
    assert meta(find(run, "best")).step == first_best
    assert meta(find(run, "best")).scores["accuracy"] == scored[first_best]


def test_a_checkpoint_copied_elsewhere_is_whole_in_itself(
    run: Path, lorakit: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(find(run, "last"), tmp_path / "ckpt")
    shutil.rmtree(run)
    assert lorakit("prune", "ckpt/").code == 0
    assert (tmp_path / "ckpt" / "pruned" / "adapter_config.json").is_file()


def test_resuming_a_finished_run_trains_nothing(run: Path, lorakit: Callable[..., Any]) -> None:
    before = (run / "metrics.jsonl").read_text()
    answer = lorakit("train", "recipe.yaml", "train.eval_every=2", "--resume")
    assert answer.code == 0
    assert (run / "metrics.jsonl").read_text() == before
    assert "6" in answer.out


def test_resuming_with_another_recipe_is_refused_with_every_difference(
    run: Path, lorakit: Callable[..., Any]
) -> None:
    answer = lorakit("train", "recipe.yaml", "train.lr=0.5", "seed=3", "--resume")
    assert answer.code == 2
    for said in ("train.lr: 0.001 there, 0.5 here", "seed: 0 there, 3 here", "eval_every: 2 there"):
        assert said in answer.err


def test_a_run_folder_stands_for_its_own_recipe(run: Path, lorakit: Callable[..., Any]) -> None:
    assert lorakit("train", run, "--resume").code == 0


def test_resuming_before_the_first_checkpoint_starts_over(
    run: Path, lorakit: Callable[..., Any]
) -> None:
    shutil.rmtree(run / "checkpoints")
    before = metrics(run)
    assert lorakit("train", run, "--resume").code == 0
    assert metrics(run) == before


def metrics(run: Path) -> list[Any]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "samples_per_s"} for row in rows]


def test_a_checkpoint_of_another_model_is_refused_with_every_difference(
    run: Path, lorakit: Callable[..., Any]
) -> None:
    file = find(run, "last") / "adapter.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    tensors[f"{first}.extra"] = tensors.pop(first)
    tensors[second] = torch.zeros(2, 2)
    save_file(tensors, file)
    manifest.write(file.parent)
    answer = lorakit("eval", run, "--checkpoint", "last")
    assert answer.code == 2
    for said in (f"{first}: not in the checkpoint", f"{first}.extra: not in the model", "(2, 2)"):
        assert said in answer.err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter.safetensors", b"\x00\x01"),
        ("state.json", b"{"),
        ("state.json", b'{"format": 99, "lorakit": "9.9"}'),
        ("head.safetensors", None),
    ],
)
def test_a_broken_checkpoint_is_refused_by_the_file_s_name(
    run: Path, lorakit: Callable[..., Any], file: str, content: bytes | None
) -> None:
    path = find(run, "last") / file
    path.unlink() if content is None else path.write_bytes(content)
    answer = lorakit("prune", run, "--checkpoint", "last", "--out", "pruned")
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert file in answer.err or "format 99" in answer.err
    assert not Path("pruned").exists()


def test_the_newest_run_is_the_one_written_last(run: Path, lorakit: Callable[..., Any]) -> None:
    assert lorakit("train", "recipe.yaml", "output_dir=runs/a-later-one").code == 0
    assert newest_run(Path("runs")).name == "a-later-one"
    answer = lorakit("eval")
    assert "the newest run: runs/a-later-one" in answer.err


def test_moments_come_back_to_the_parameters_they_belong_to() -> None:
    settings = section(steps=1)
    one, other = (pupil(LoRAConfig(variant="lora", rank=4, alpha=4.0), settings) for _ in range(2))
    for p in one.model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    one.optimizer.step()
    saved = checkpoint.state_tensors(one.model, one.optimizer)
    checkpoint.load_state_tensors(other.model, other.optimizer, saved)
    assert_close(checkpoint.state_tensors(other.model, other.optimizer), saved, rtol=0, atol=0)
    assert "up.A.exp_avg" in saved


# starting from a run


def test_ranks_from_starts_a_fresh_adapter_at_learned_ranks(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.2, gate_init: normal}")
    assert lorakit("train", recipe, *sora).code == 0
    learned = {n: layer.rank() for n, layer in open_trained(Path("runs/tiny")).layers.items()}
    assert 0 in learned.values()
    assert len(set(learned.values())) > 2
    for source in ("runs/tiny", "runs/tiny/pruned"):
        if source.endswith("pruned"):
            assert lorakit("prune", "runs/tiny").code == 0
        shutil.rmtree("runs/fresh", ignore_errors=True)
        answer = lorakit("train", recipe, f"adapter.ranks_from={source}", "output_dir=runs/fresh")
        assert answer.code == 0, answer.err
        fresh = open_trained(Path("runs/fresh"), "last")
        ranks = {name: layer.rank() for name, layer in fresh.layers.items()}
        assert ranks == {name: rank for name, rank in learned.items() if rank}
        assert {layer.scale for layer in fresh.layers.values()} == {1.0}


def test_ranks_from_a_run_takes_the_ranks_it_trained_not_those_it_writes(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """OLoRA's plain pair has twice the rank, since it subtracts its start."""
    assert lorakit("train", recipe, "adapter.variant=olora").code == 0
    answer = lorakit("train", recipe, "adapter.ranks_from=runs/tiny", "output_dir=runs/fresh")
    assert answer.code == 0, answer.err
    assert set(open_trained(Path("runs/fresh"), "last").start.values()) == {4}


def test_init_from_goes_on_where_the_pruned_adapter_was(
    recipe: Path, lorakit: Callable[..., Any]
) -> None:
    """One step at a rate of almost 0 leaves adapter and head as they came."""
    sora = ("adapter.variant=sora", "adapter.sparsity={xi: 0.1, gate_init: normal}")
    assert lorakit("train", recipe, *sora, "train.lr=0.02").code == 0
    assert lorakit("prune", "runs/tiny").code == 0
    start = open_trained(Path("runs/tiny/pruned"))
    answer = lorakit(
        "train",
        recipe,
        "adapter.init_from=runs/tiny/pruned",
        "adapter.alpha=32",
        "output_dir=runs/on",
        "train.lr=1e-12",
        "train.steps=1",
    )
    assert answer.code == 0, answer.err
    on = open_trained(Path("runs/on"), "last")
    assert on.layers.keys() == start.layers.keys()
    for name, layer in on.layers.items():
        A, B = start.layers[name].factors()
        assert_close(layer.factors().B @ layer.factors().A, B @ A)
    assert_close(on.whole["classifier"].weight.data, start.whole["classifier"].weight.data)


@pytest.mark.parametrize("key", ["init_from", "ranks_from"])
def test_a_start_that_is_not_there_is_refused(
    recipe: Path, lorakit: Callable[..., Any], key: str
) -> None:
    answer = lorakit("train", recipe, f"adapter.{key}=runs/nowhere")
    assert answer.code == 2
    assert f"adapter.{key}: 'runs/nowhere'" in answer.err
    assert not Path("runs").exists()


# writing


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with whole_folder(tmp_path / "made") as folder:
            (folder / "one").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "made") as folder:
        assert not (tmp_path / "made").exists()
        (folder / "one").write_text("1")
    assert (tmp_path / "made" / "one").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_file_is_replaced_in_one_stroke(tmp_path: Path) -> None:
    path = tmp_path / "last"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["last"]

"""Checkpoints that earlier versions wrote are read, answer as they did, and go on."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Answer
from torch.testing import assert_close

from lorakit import models, variants
from lorakit.checkpoint import FORMAT
from lorakit.trained import logits, open_trained

KEPT = Path(__file__).parent / "data"
FOLDERS = sorted(path.parent for path in KEPT.glob("format-*/*/state.json"))
IDS = [f"{path.parent.name} {path.name}" for path in FOLDERS]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder they were written in: `base` and `rows.csv`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(KEPT / "base", "base")
    texts = [f"a {word} film number {i},{word}" for i in range(30) for word in ("warm", "dull")]
    Path("rows.csv").write_text("\n".join(["text,label", *texts]) + "\n")
    return tmp_path


def begun(folder: Path) -> Path:
    """A run that was left at a kept checkpoint."""
    run = Path("runs") / folder.name
    shutil.copytree(folder, run / "checkpoints" / "step-000006")
    (run / "checkpoints" / "last").write_text("step-000006\n")
    shutil.copy(folder / "recipe.yaml", run / "recipe.yaml")
    (run / "metrics.jsonl").touch()
    return run


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_a_kept_checkpoint_answers_as_it_did(place: Path, folder: Path) -> None:
    wanted = json.loads((folder.parent / "logits.json").read_text())[folder.name]
    model = open_trained(folder).model
    assert_close(logits(model, models.probe(model)), torch.tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_a_kept_checkpoint_is_gone_on_from(
    place: Path, folder: Path, lorakit: Callable[..., Answer]
) -> None:
    answer = lorakit("train", begun(folder), "--resume")
    assert answer.code == 0, answer.err
    assert "resumed at step 6 of 12" in answer.err


def test_the_best_step_that_an_earlier_format_names_is_kept_up_with(
    place: Path, lorakit: Callable[..., Answer]
) -> None:
    run = begun(KEPT / "format-1" / "lora")
    path = run / "checkpoints" / "step-000006" / "state.json"
    state = json.loads(path.read_text())
    state["progress"] |= {"best_step": 6, "best_score": 1e9}
    path.write_text(json.dumps(state))
    answer = lorakit("train", run, "--resume")
    assert answer.code == 0, answer.err
    assert (run / "checkpoints" / "best").read_text() == "step-000006\n"


def test_every_variant_has_a_checkpoint_that_is_kept() -> None:
    kept = {folder.name for folder in FOLDERS if folder.parent.name == f"format-{FORMAT}"}
    lacking = sorted(set(variants.names()) - kept)
    assert not lacking, f"keep one of {', '.join(lacking)}: python scripts/keep_checkpoints.py"


def test_what_is_kept_is_small_and_names_no_machine() -> None:
    for folder in FOLDERS:
        files = list(folder.iterdir())
        assert sum(path.stat().st_size for path in files) < 100_000
        for path in files:
            if path.suffix != ".safetensors":
                assert not re.search(r"(?m)[ '\"]/\w", path.read_text())

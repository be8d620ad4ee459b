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

from lorakit import models
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


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_a_kept_checkpoint_answers_as_it_did(place: Path, folder: Path) -> None:
    wanted = json.loads((folder.parent / "logits.json").read_text())[folder.name]
    model = open_trained(folder).model
    assert_close(logits(model, models.probe(model)), torch.tensor(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize("folder", FOLDERS, ids=IDS)
def test_a_kept_checkpoint_is_gone_on_from(
    place: Path, folder: Path, lorakit: Callable[..., Answer]
) -> None:
    run = place / "runs" / folder.name
    shutil.copytree(folder, run / "checkpoints" / "step-000006")
    (run / "checkpoints" / "last").write_text("step-000006\n")
    shutil.copy(folder / "recipe.yaml", run / "recipe.yaml")
    (run / "metrics.jsonl").touch()
    answer = lorakit("train", Path("runs") / folder.name, "--resume")
    assert answer.code == 0, answer.err
    assert "resumed at step 6 of 12" in answer.err


def test_what_is_kept_is_small_and_names_no_machine() -> None:
    for folder in FOLDERS:
        files = list(folder.iterdir())
        assert sum(path.stat().st_size for path in files) < 100_000
        for path in files:
            if path.suffix != ".safetensors":
                assert not re.search(r"(?m)[ '\"]/\w", path.read_text())

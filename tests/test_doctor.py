"""What `lorakit doctor` sees before a run would; and what nothing may tell: secrets and homes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Answer
from torch import nn

from lorakit import doctor
from lorakit import recipe as recipes
from lorakit.doctor import Check
from lorakit.prepare import prepare

Lorakit = Callable[..., Answer]


@pytest.fixture
def seen(lorakit: Lorakit) -> Callable[..., dict[str, list[Check]]]:
    """Types the command; checks by name, after its exit code has been found right."""

    def examine(*arguments: object) -> dict[str, list[Check]]:
        answer = lorakit("doctor", *arguments, "--json")
        told = json.loads(answer.out)
        checks = [Check(**check) for check in told["checks"]]
        assert told["ok"] == (answer.code == 0)
        assert answer.code == int(any(check.state == "fail" for check in checks))
        found: dict[str, list[Check]] = {}
        for check in checks:
            found.setdefault(check.name, []).append(check)
        return found

    return examine


def failed(checks: dict[str, list[Check]]) -> dict[str, str]:
    return {c.name: c.text for several in checks.values() for c in several if c.state == "fail"}


def rewrite(recipe: Path, **sections: object) -> None:
    recipe.write_text(yaml.safe_dump({**yaml.safe_load(recipe.read_text()), **sections}))


def test_a_sound_recipe_is_well_in_every_line(
    seen: Callable[..., dict[str, list[Check]]], recipe: Path
) -> None:
    checks = seen(recipe)
    assert failed(checks) == {}
    assert checks["rows"][0].text == "60 for training"
    assert checks["model"][0].text.endswith(": 13 linears, 52 ranks")
    assert len(checks["memory"]) == len(checks["disk"]) == 2  # of the machine, of the recipe
    assert not Path("runs").exists()


def test_the_table_has_a_sign_and_a_sentence_for_each_line(lorakit: Lorakit, recipe: Path) -> None:
    rewrite(recipe, output_dir=str(recipe))
    answer = lorakit("doctor", recipe)
    assert answer.code == 1
    lines = answer.out.splitlines()
    assert any(line.startswith("✓ versions") and torch.__version__ in line for line in lines)
    assert any(line.startswith("! hub") and "HF_HUB_OFFLINE" in line for line in lines)
    assert any(line.startswith("✗ output") and "nothing is overwritten" in line for line in lines)


def test_all_that_is_missing_is_told_at_once(
    seen: Callable[..., dict[str, list[Check]]], recipe: Path
) -> None:
    rewrite(recipe, model={"name": "no/such"}, data={"train": "none.csv"}, output_dir=str(recipe))
    told = failed(seen(recipe))
    assert set(told) == {"output", "rows", "model"}
    assert "none.csv" in told["rows"]
    assert told["model"].startswith("model.name: 'no/such' cannot be loaded")


def test_a_recipe_that_is_none_is_told_with_its_faults(
    seen: Callable[..., dict[str, list[Check]]], recipe: Path
) -> None:
    rewrite(recipe, train={"lrr": 1})
    assert "train.lrr: no such key. Nearest: 'lr'." in failed(seen(recipe))["recipe"]
    assert "cannot be read" in failed(seen("none.yaml"))["recipe"]


def test_what_only_the_whole_shows_is_told(
    seen: Callable[..., dict[str, list[Check]]], recipe: Path
) -> None:
    told = failed(seen(recipe, "adapter.targets=[qeury]"))
    assert "Nearest: 'query'" in told["recipe"]


def test_a_run_that_needs_more_than_there_is_would_fail() -> None:
    assert doctor.memory(100, 1000).state == "ok"
    assert doctor.memory(900, 1000).state == "note"
    assert doctor.memory(1001, 1000).state == "fail"
    free = shutil.disk_usage(Path.cwd()).free
    assert doctor.disk(free // 2, Path("runs/x")).state == "ok"
    assert doctor.disk(2 * free, Path("runs/x")).state == "fail"


def test_what_checkpoints_take_is_what_they_take(recipe: Path, lorakit: Lorakit) -> None:
    """Within a tenth, and the names in the headers of tiny files."""
    settings = ("adapter.rank=16", "train.eval_every=null", "train.save_every=2")
    prepared = prepare(recipes.load(recipe, settings))
    assert lorakit("train", recipe, *settings).code == 0
    folders = list(Path("runs/tiny/checkpoints").glob("step-*"))
    assert len(folders) <= doctor.checkpoints(prepared) <= len(folders) + 1
    for folder in folders:
        tensors = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        assert doctor.checkpoint_bytes(prepared) <= tensors
        assert tensors <= 1.1 * doctor.checkpoint_bytes(prepared) + 40_000


def test_an_estimate_above_the_memory_there_is_fails_in_the_command(
    seen: Callable[..., dict[str, list[Check]]], recipe: Path
) -> None:
    told = failed(seen(recipe, "train.batch_size=1000000000", "task.max_length=512"))
    assert set(told) == {"memory"}
    assert "train.accumulate" in told["memory"]


class Forgetful(nn.Linear):
    """Has no gradient for its input once it has been evaluated."""

    def __init__(self, raises: bool = False) -> None:
        super().__init__(64, 64)
        self.raises, self.evaluated = raises, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.raises:
            raise RuntimeError("no kernel")
        self.evaluated |= not self.training
        return super().forward(x.detach() if self.evaluated else x)


def test_the_probe_sees_a_linear_that_stops_learning_after_an_evaluation() -> None:
    assert doctor.quantization().state == "ok"
    assert doctor.quantization(make=Forgetful).state == "note"
    assert doctor.quantization(needed=True, make=Forgetful).state == "fail"
    broken = doctor.quantization(needed=True, make=lambda: Forgetful(raises=True))
    assert (broken.state, "no kernel" in broken.text) == ("fail", True)


def test_a_hub_that_is_not_reached_is_to_be_known_and_no_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    assert "HF_HUB_OFFLINE" in doctor.hub().text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert doctor.hub().state == "note"
    assert "not reached" in doctor.hub().text


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_an_output_folder_where_nothing_can_be_written(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lorakit import doctor\n"
        "if os.geteuid() == 0:\n"
        "    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "check = doctor._output(Path(sys.argv[1]))\n"
        "print(check.state, check.text)\n"
    )
    locked = Path("/") if os.geteuid() == 0 else tmp_path
    if locked == tmp_path:
        tmp_path.chmod(0o555)
    ended = subprocess.run(
        [sys.executable, "-c", code, str(locked / "lorakit-no-such" / "run")],
        capture_output=True,
        text=True,
    )
    tmp_path.chmod(0o755)
    if "Operation not permitted" in ended.stderr:
        pytest.skip("root may not become another user here")
    assert ended.stdout.startswith("fail "), ended.stderr
    assert "no permission to write" in ended.stdout


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="/proc is Linux's")
def test_an_output_folder_where_the_system_makes_none() -> None:
    check = doctor._output(Path("/proc/run"))
    assert (check.state, check.text[:26]) == ("fail", "/proc/run cannot be made: ")
    assert ".lorakit-" not in check.text


# what nothing may tell

SECRETS = {
    "HF_TOKEN": "hf_m4rkA",
    "HUGGING_FACE_HUB_TOKEN": "hf_m4rkB",
    "WANDB_API_KEY": "m4rkC",
    "AWS_SECRET_ACCESS_KEY": "m4rkD",
    "AWS_SESSION_TOKEN": "m4rkE",
    "OPENAI_API_KEY": "sk-m4rkF",
    "GITHUB_TOKEN": "ghp_m4rkG",
    "DATABASE_URL": "postgres://m4rkH:m4rkI@host/db",
    "HTTPS_PROXY": "http://m4rkJ:m4rkK@127.0.0.1:9",
    "CUDA_HOME": "/home/m4rkL/cuda",
    "USER": "m4rkM",
    "LOGNAME": "m4rkM",
}


def test_no_file_and_nothing_printed_has_a_secret_of_the_environment(
    recipe: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    told = [
        lorakit(*arguments)
        for arguments in (
            ("train", recipe),
            ("prune", "runs/tiny"),
            ("eval", "runs/tiny/pruned"),
            ("doctor", recipe),
            ("env",),
            ("train", recipe, "model.name=no/such", "output_dir=runs/other"),
        )
    ]
    assert [answer.code for answer in told] == [0, 0, 0, 1, 0, 2]
    texts = [answer.out + answer.err for answer in told]
    texts += [path.read_bytes().decode("latin-1") for path in Path().rglob("*") if path.is_file()]
    for text in texts:
        assert "m4rk" not in text


def test_a_report_tells_versions_and_only_variables_that_hold_no_secret(
    lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    report = json.loads(lorakit("env").out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["variables"]["OMP_NUM_THREADS"] == "1"
    assert {"python", "platform", "device", "instructions", "commit"} <= report.keys()


def test_the_home_folder_is_in_no_environment_json_no_card_and_no_report(
    recipe: Path, tiny: Path, tmp_path: Path, lorakit: Lorakit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card is for others: it names a local base model by its folder alone."""
    home = tmp_path / "home" / "m4rkM"
    shutil.copytree(tiny, home / "models" / "base")
    monkeypatch.setenv("HOME", str(home))
    rewrite(recipe, model={"name": str(home / "models" / "base"), "precision": "fp32"})
    assert lorakit("train", recipe).code == 0
    assert lorakit("prune", "runs/tiny").code == 0
    texts: list[Any] = [Path("runs/tiny/environment.json"), Path("runs/tiny/pruned/README.md")]
    for text in (*[path.read_text() for path in texts], lorakit("env").out):
        assert "m4rkM" not in text

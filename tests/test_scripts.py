"""What a person runs by hand, and what a script has written into the repository."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from lorakit import recipe as recipes

ROOT = Path(__file__).parents[1]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def test_the_recipe_reference_is_what_its_script_writes() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "recipe_reference.py"))["page"]()
    assert (ROOT / "docs" / "recipe.md").read_text() == page


def test_every_fault_that_is_planted_on_purpose_has_its_line_and_its_tests() -> None:
    """Else the code has moved on, and a fault is no longer planted."""
    faults = runpy.run_path(str(ROOT / "scripts" / "mutants.py"))["MUTANTS"]
    gone = [
        f"{fault.file}: {fault.why}"
        for fault in faults
        if not (ROOT / "lorakit" / fault.file).is_file()
        or fault.line not in (ROOT / "lorakit" / fault.file).read_text(encoding="utf-8")
        or not (ROOT / fault.tests).is_file()
    ]
    assert len(faults) > 90
    assert not gone


def test_results_are_means_and_spreads_over_seeds_a_line_for_each_method() -> None:
    def row(method: str, seed: int, accuracy: float, ranks: int) -> dict[str, object]:
        scores = {"accuracy": accuracy, "loss": 0.5}
        size = {"ranks": ranks, "parameters": 1000 * ranks, "kB": 4.0 * ranks}
        size["packed"] = 0.5 * ranks if method == "B-LoRA" else None
        return {"task": "sst2", "method": method, "seed": seed, "scores": scores, **size}

    rows = [row("LoRA", 0, 90.0, 296), row("LoRA", 1, 92.0, 296), row("B-LoRA", 0, 91.0, 148)]
    lines = runpy.run_path(str(ROOT / "scripts" / "results.py"))["markdown"](rows).splitlines()
    assert lines[0] == "### sst2"
    assert lines[4] == "| LoRA | 91.00 ± 1.41 | 296 | 296,000 | 1,184 |  |"
    assert lines[5] == "| B-LoRA | 91.00 | 148 | 148,000 | 592 | 74 |"


@pytest.mark.parametrize("method", runpy.run_path(str(ROOT / "scripts" / "results.py"))["METHODS"])
def test_the_settings_of_every_method_make_a_recipe(method: str) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "results.py"))
    job = script["Job"]("mrpc", method, 1)
    given = SimpleNamespace(data_dir="d", out=Path("runs"), steps=None, overrides=["train.lr=5e-4"])
    recipe = recipes.load(script["BASE"], script["settings"](job, given))
    assert (recipe.train.steps, recipe.train.lr, recipe.seed) == (345, 5e-4, 1)


def test_a_picture_holds_every_rank_and_asks_no_other_host() -> None:
    start = {"bert.encoder.layer.0.attention.self.query": 16, "encoder.layer.1.output.dense": 14}
    picture = runpy.run_path(str(ROOT / "scripts" / "picture.py"))["picture"]
    drawn = picture(start, dict(zip(start, (5, 13), strict=True)))
    words = re.findall(r">(?:&#160;)*([^<>&]+)(?:&#160;)*</text>", drawn)

    assert {"5", "13", "18/30", "attention", "dense"} <= {word.strip(".") for word in words}
    assert re.findall(r"https?://[^\"\s)]+", drawn) == ["http://www.w3.org/2000/svg"]


def test_results_stand_between_the_marks_of_the_readme() -> None:
    with_results = runpy.run_path(str(ROOT / "scripts" / "picture.py"))["with_results"]
    page = "above\n<!-- results -->\nold\n<!-- /results -->\nbelow\n"
    assert with_results(page, "new \\1") == (
        "above\n<!-- results -->\n```text\nnew \\1\n```\n<!-- /results -->\nbelow\n"
    )


def test_all_that_is_required_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(need for needs in extras for need in needs)]
    names = {re.split(r"[<>=!~\[; ]", need)[0] for need in wanted}

    assert sorted(name for name in names if name not in PINS) == []


@pytest.mark.parametrize("package", sorted(PINS))
def test_what_is_tested_is_what_is_pinned(package: str) -> None:
    installed = version(package).partition("+")[0]  # 2.13.0+cpu is 2.13.0
    assert installed == PINS[package]


def test_ci_runs_the_test_script_and_nothing_else() -> None:
    _, *commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands == ['exec "$(dirname -- "$0")/../scripts/test.sh" "$@"']
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the shell scripts need of the project, in a folder of its own without .venv."""
    for name in ("scripts", "lorakit", "recipes"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_an_old_python_is_refused_by_name_and_nothing_is_made(checkout: Path, script: str) -> None:
    old = program(checkout / "python3.9", '[ "$1" = --version ] && echo "Python 3.9.6" || exit 1')
    done = subprocess.run(
        [checkout / "scripts" / script],
        env={**os.environ, "PYTHON": str(old)},
        cwd="/",
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert "is Python 3.9.6; lorakit needs Python 3.11 or later" in done.stderr
    assert not (checkout / ".venv").exists()


def with_venv(checkout: Path, extras: str, **programs: str) -> None:
    """A .venv in which nothing is left to install, and where `programs` say what they are given."""
    bin_folder = checkout / ".venv" / "bin"
    program(bin_folder / "python", f'exec "{sys.executable}" "$@"')
    for name, text in programs.items():
        program(bin_folder / name.replace("_", "-"), text)
    state = subprocess.run(
        ["bash", "-c", ". scripts/venv.sh; venv_state"], cwd=checkout, capture_output=True
    )
    (checkout / ".venv" / f".installed-{extras}").write_bytes(state.stdout)


def test_a_second_quickstart_trains_into_a_folder_of_its_own(checkout: Path) -> None:
    with_venv(checkout, "quickstart", lorakit='echo "$HF_HUB_OFFLINE: $@"')
    (checkout / "runs" / "quickstart").mkdir(parents=True)
    script = checkout / "scripts" / "quickstart.sh"
    second = subprocess.run([script, "seed=1"], cwd="/", capture_output=True, text=True)
    named = subprocess.run([script, "output_dir=runs/x y"], cwd="/", capture_output=True, text=True)

    assert second.stdout.splitlines() == [
        "1: train recipes/quickstart.yaml seed=1 output_dir=runs/quickstart-2",
        "1: prune runs/quickstart-2",
        "1: eval runs/quickstart-2/pruned",
    ]
    assert named.stdout.splitlines()[1:] == ["1: prune runs/x y", "1: eval runs/x y/pruned"]


def test_the_first_step_that_fails_ends_the_tests(checkout: Path) -> None:
    steps = dict.fromkeys(("ruff", "lint_imports", "pytest"), 'echo "$(basename "$0") $@"')
    with_venv(checkout, "dev,quickstart,lm-eval", **steps, mypy="echo mypy; exit 1")
    script = checkout / "scripts" / "test.sh"
    failed = subprocess.run([script, "-k", "a b"], cwd="/", capture_output=True, text=True)
    program(checkout / ".venv" / "bin" / "mypy", "echo mypy")
    passed = subprocess.run([script, "-k", "a b"], cwd="/", capture_output=True, text=True)

    assert failed.returncode == 1
    assert failed.stdout.splitlines() == ["ruff check .", "ruff format --check .", "mypy"]
    assert passed.returncode == 0
    assert passed.stdout.splitlines()[-2:] == ["lint-imports ", "pytest -k a b"]

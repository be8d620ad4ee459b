"""The command line as a person types it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
import yaml
from conftest import Answer

import lorakit as package
from lorakit import recipe as recipes
from lorakit import shipped
from lorakit.cli import app

Lorakit = Callable[..., Answer]
BIN = Path(sys.executable).parent
COMMANDS = (
    *("train", "prune", "merge", "export", "eval", "predict", "schema", "doctor", "env"),
    *("recipes list", "recipes show", "recipes copy"),
)


def typed(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Types `command` in a shell's manner, in a process of its own."""
    paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        command.split(),
        cwd=folder,
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leaves(group: object = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """(what one types, the command), for every command."""
    group = group or typer.main.get_command(app)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


# help


def test_there_are_these_commands() -> None:
    assert sorted(name for name, _ in leaves()) == sorted(COMMANDS)


@pytest.mark.parametrize("arguments", ["--help", "-h", "--version", "train -h", "recipes -h"])
def test_asking_for_help_imports_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    heavy = ["torch", "transformers", "numpy", "datasets", "yaml", "rich"]
    heavy += ["pydantic"] if " " not in arguments else []  # typer itself reads types with it
    code = (
        "import sys; from lorakit.cli import main\n"
        f"try: main({arguments.split()!r})\n"
        f"except SystemExit: print('heavy:', [m for m in {heavy!r} if m in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert ended.stdout.splitlines()[-1] == "heavy: []"
    assert ended.stderr == ""


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_argument_is_explained(name: str) -> None:
    command = dict(leaves())[name]
    unexplained = [p.name for p in command.params if not getattr(p, "help", None)]  # type: ignore[attr-defined]
    assert not unexplained


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_is_typed_as_it_stands(lorakit: Lorakit, name: str) -> None:
    answer = lorakit(*name.split(), "--help")
    assert answer.code == 0
    _, _, examples = answer.out.partition("For example:")
    assert f"\n    lorakit {name}" in examples
    assert "[/" not in answer.out, "markup"


def examples() -> list[list[str]]:
    """Every example of every help text, as words."""
    return [
        line.split()[1:]
        for _, command in leaves()
        for line in command.help.splitlines()  # type: ignore[attr-defined]
        if line.strip().startswith("lorakit ")
    ]


@pytest.mark.parametrize("words", examples(), ids=" ".join)
def test_an_example_of_the_help_is_understood(words: list[str]) -> None:
    """Parsed to the end, without running: an option that isn't there would end it."""
    command = typer.main.get_command(app)
    words = words[: words.index(">")] if ">" in words else words
    context = command.make_context("lorakit", [*words[:1], "--help"], resilient_parsing=True)
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, words)
    assert command.make_context(name, list(words)).command is command


def test_the_root_and_a_group_say_how_to_begin(lorakit: Lorakit) -> None:
    assert "lorakit train recipes/quickstart.yaml" in lorakit("--help").out
    assert "lorakit recipes copy quickstart mine.yaml" in lorakit("recipes", "--help").out


def test_without_a_command_help_is_shown(lorakit: Lorakit) -> None:
    for arguments in ((), ("recipes",)):
        answer = lorakit(*arguments)
        assert "Usage: " in answer.out + answer.err
        assert "Commands:" in answer.out + answer.err


def test_a_mistyped_command_is_answered_with_the_nearest(lorakit: Lorakit) -> None:
    answer = lorakit("evl")
    assert answer.code == 2
    assert "Did you mean 'eval', 'env'?" in answer.err
    assert lorakit("train", "x.yaml", "--rsume").code == 2


def test_the_version_is_printed(lorakit: Lorakit) -> None:
    assert lorakit("--version").out == f"lorakit {package.__version__}\n"


def test_the_module_starts_as_the_script_does(tmp_path: Path) -> None:
    ended = typed(f"{sys.executable} -m lorakit --version", tmp_path)
    assert (ended.returncode, ended.stdout) == (0, f"lorakit {package.__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed(tmp_path: Path, shell: str) -> None:
    ended = typed("lorakit", tmp_path, _LORAKIT_COMPLETE=f"source_{shell}")
    assert ended.returncode == 0
    assert "_LORAKIT_COMPLETE=complete_" + shell in ended.stdout


def test_commands_are_completed(tmp_path: Path) -> None:
    asked = {"_LORAKIT_COMPLETE": "complete_bash", "COMP_WORDS": "lorakit pr", "COMP_CWORD": "1"}
    assert typed("lorakit", tmp_path, **asked).stdout.split() == ["prune", "predict"]


# train, prune, eval


def test_a_dry_run_checks_and_writes_nothing(lorakit: Lorakit, recipe: Path) -> None:
    before = snapshot(recipe.parent)
    answer = lorakit("train", "recipe.yaml", "--dry-run", "train.lr=5e-4")
    assert answer.code == 0
    assert snapshot(recipe.parent) == before
    table, _, dumped = answer.out.partition("\n\n")
    facts = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert facts["rows"].strip() == "train 60, validation 20"
    assert facts["labels"].strip() == "2: bad, good"
    assert facts["adapted"].strip() == "13 linears, 52 ranks"
    assert facts["steps"].strip() == "6"
    assert facts["memory"].startswith("about ")
    (recipe.parent / "again.yaml").write_text(dumped)
    assert recipes.load(Path("again.yaml")) == recipes.load(recipe, ["train.lr=5e-4"])


def test_a_dry_run_tells_as_json(lorakit: Lorakit, recipe: Path) -> None:
    answer = lorakit("train", "recipe.yaml", "--dry-run", "--json")
    facts = json.loads(answer.out)
    assert answer.err == ""
    assert facts["rows"] == {"train": 60, "validation": 20}
    assert facts["labels"] == ["bad", "good"]
    assert facts["head"] == ["classifier"]
    assert facts["ranks"]["bert.encoder.layer.0.attention.self.query"] == 4
    assert facts["trainable"] == sum(4 * (16 + 16) * 4 + 2 * 4 * 48 for _ in range(2)) + 4 * 32 + 34
    assert facts["steps"] == 6
    assert set(facts["memory"]) == {"base", "trained", "activations"}
    assert facts["recipe"] == recipes.load(recipe).model_dump(mode="json")


def test_results_are_json_and_nothing_else_where_they_are_asked_for(
    lorakit: Lorakit, recipe: Path
) -> None:
    answers = {
        "train": lorakit("train", "recipe.yaml", "--json"),
        "prune": lorakit("prune", "runs/tiny", "--json"),
        "eval": lorakit("eval", "--json", "--output-path", "scores.json"),
    }
    for answer in answers.values():
        assert (answer.code, answer.err) == (0, "")
    found = {name: json.loads(answer.out) for name, answer in answers.items()}
    assert found["train"]["run"] == "runs/tiny"
    assert found["train"]["step"] == 6
    assert (found["train"]["live"], found["train"]["start"]) == (52, 52)
    assert set(found["train"]["scores"]) == {"accuracy", "macro_f1", "loss"}
    assert found["prune"]["out"] == "runs/tiny/pruned"
    assert sum(found["prune"]["ranks"].values()) == 52
    assert found["eval"]["rows"] == 20
    assert found["eval"]["task"] == "classification"
    assert found["eval"]["scores"] == pytest.approx(found["train"]["scores"], rel=1e-5)
    assert json.loads(Path("scores.json").read_text()) == found["eval"]


def test_what_a_person_reads_names_the_next_command(lorakit: Lorakit, recipe: Path) -> None:
    answer = lorakit("train", "recipe.yaml")
    assert "lorakit prune runs/tiny" in answer.out
    assert "step     6/6  loss " in answer.err
    assert "Ranks kept" in lorakit("prune", "runs/tiny").out
    scored = lorakit("eval")
    assert scored.err.startswith("· the newest run: runs/tiny\n")
    assert "accuracy" in scored.out
    reloaded = lorakit("eval", "runs/tiny/pruned").out
    assert "before pruning" in reloaded
    assert reloaded.startswith("runs/tiny/pruned on classification, validation, 20 rows\n")


def test_a_limit_scores_the_first_rows_alone(lorakit: Lorakit, recipe: Path) -> None:
    assert lorakit("train", "recipe.yaml", "train.steps=1").code == 0
    found = json.loads(lorakit("eval", "--json", "--limit", 7, "--batch-size", 3).out)
    assert found["rows"] == 7
    assert json.loads(lorakit("eval", "--json", "--split", "train").out)["rows"] == 60


def test_a_run_folder_stands_for_its_recipe(lorakit: Lorakit, recipe: Path) -> None:
    assert lorakit("train", "recipe.yaml", "train.steps=2").code == 0
    found = json.loads(lorakit("train", "runs/tiny", "--dry-run", "--json", "output_dir=x").out)
    assert found["steps"] == 2


def test_the_three_commands_as_they_are_written(tmp_path: Path, tiny: Path) -> None:
    rows = [f"a {word} film number {i}\t{label}" for i in range(24) for word, label in WORDS]
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    for name, part in (("train", rows[:32]), ("dev", rows[32:])):
        text = "\n".join(["sentence\tlabel", *part]) + "\n"
        (tmp_path / "glue" / "SST-2" / f"{name}.tsv").write_text(text)
    settings = {
        "model": {"name": str(tiny), "precision": "fp32"},
        "task": {"name": "glue/sst2", "data_dir": "glue", "max_length": 16},
        "adapter": {"variant": "sora", "rank": 4, "alpha": 4},
        "train": {"steps": 4, "batch_size": 8, "save_every": 2},
        "output_dir": "runs/sst2",
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))

    trained = typed("lorakit train recipe.yaml", tmp_path)
    assert trained.returncode == 0, trained.stderr
    checkpoints = tmp_path / "runs" / "sst2" / "checkpoints"
    last = (checkpoints / "last").read_text().strip()
    shutil.copytree(checkpoints / last, tmp_path / "ckpt")

    pruned = typed("lorakit prune ckpt/", tmp_path)
    assert pruned.returncode == 0, pruned.stderr
    assert (tmp_path / "ckpt" / "pruned" / "adapter_model.safetensors").is_file()

    scored = typed("lorakit eval --task glue/sst2", tmp_path)
    assert scored.returncode == 0, scored.stderr
    assert scored.stderr.startswith("· the newest run: runs/sst2\nWARNING: train has 32 rows")
    assert " on glue/sst2, validation, 16 rows\n" in scored.stdout
    assert "accuracy" in scored.stdout


WORDS = (("dull", 0), ("bright", 1))


# recipes and schema


def test_recipes_are_listed_with_their_first_line(lorakit: Lorakit) -> None:
    lines = lorakit("recipes", "list").out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(shipped.recipes())
    assert (
        next(line for line in lines if line.startswith("quickstart"))
        .split(maxsplit=1)[1]
        .startswith("SoRA on BBC News topics")
    )


def test_recipes_are_listed_as_json(lorakit: Lorakit) -> None:
    found = json.loads(lorakit("recipes", "list", "--json").out)
    assert list(found) == sorted(shipped.recipes())
    assert found["quickstart"].startswith("SoRA on BBC News topics")


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml"])
def test_a_recipe_is_shown_as_it_is(lorakit: Lorakit, name: str) -> None:
    text = (shipped.folder() / "quickstart.yaml").read_text()
    assert lorakit("recipes", "show", name).out == text


@pytest.mark.parametrize(("to", "made"), [((), "quickstart.yaml"), (("mine.yaml",), "mine.yaml")])
def test_a_recipe_is_copied_with_the_schema_beside_it(
    lorakit: Lorakit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: tuple[str, ...],
    made: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lorakit("recipes", "copy", "quickstart", *to) == Answer(0, f"{made}\n", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([made, "recipe.schema.json"])
    assert recipes.load(Path(made)) == recipes.load(shipped.find("quickstart"))
    schema = json.loads((tmp_path / "recipe.schema.json").read_text())
    assert schema == recipes.json_schema()
    (tmp_path / "recipe.schema.json").write_text("{}")
    assert lorakit("recipes", "copy", "quickstart", "other.yaml").code == 0
    assert (tmp_path / "recipe.schema.json").read_text() == "{}", "a schema there is left alone"
    assert lorakit("recipes", "copy", "quickstart", *to).code == 2


def test_the_schema_is_printed_as_it_is_shipped(lorakit: Lorakit) -> None:
    assert lorakit("schema").out == (shipped.folder() / shipped.SCHEMA).read_text()

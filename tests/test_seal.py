"""Finished folders that were changed since: refused by name, or they are the same adapter still."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from conftest import Answer
from safetensors.torch import load_file, save_file

from lorakit import manifest, models, seal
from lorakit.errors import FolderError, LorakitError
from lorakit.models import Head, ModelSection
from lorakit.trained import logits, open_trained, pairs_at, ranks_at

Lorakit = Callable[..., Answer]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMS = {
    "pruned": (("prune",), "lora"),
    "packed": (("prune", "--packed"), "blora"),
    "merged": (("merge",), "lora"),
}
"""The command that writes each, and a variant of which it does."""
FREE = {"README.md", "recipe.yaml", CONFIG}
"""Not every byte of these counts."""
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def made(tiny: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each form, by its name; to be copied."""
    from lorakit.cli import main

    above = tmp_path_factory.mktemp("finished")
    given: dict[str, Any] = {
        "model": {"name": str(tiny), "precision": "fp32"},
        "task": {"name": "classification", "max_length": 24},
        "data": {"train": str(reviews)},
        "train": {"steps": 2, "batch_size": 8, "lr": 0.01},
    }
    for variant in ("lora", "blora"):
        run, recipe = above / variant, above / f"{variant}.yaml"
        more = {"adapter": {"variant": variant, "rank": 2}, "output_dir": str(run)}
        recipe.write_text(yaml.safe_dump(given | more))
        with pytest.raises(SystemExit, match="0"):
            main(["train", str(recipe)])
    for form, ((command, *options), variant) in FORMS.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, str(above / variant), *options, "--out", str(above / form)])
    return above


@pytest.fixture
def folders(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A copy of each, in the working folder."""
    monkeypatch.chdir(tmp_path)
    return {form: Path(shutil.copytree(made / form, form)) for form in FORMS}


def answers(folder: Path) -> list[Any]:
    """What is made of a folder: of a whole model, or of an adapter in its base."""
    if (folder / "config.json").exists():
        section = ModelSection(name=str(folder), precision="fp32")
        base = models.load(section, Head(("bad", "good")), 0)
        words = base.tokenizer("a warm and funny film, 10% off!")["input_ids"]
        return [logits(base.model.eval(), models.probe(base.model)).tolist(), words]
    found = open_trained(folder)
    assert found.recipe is not None
    settings = found.recipe.task.model_dump(), found.recipe.adapter.model_dump()
    facts = (found.head, found.step, found.origins, found.size, found.fingerprint.stored)
    return [logits(found.model, models.probe(found.model)).tolist(), settings, facts]


def changed(content: bytes, places: int) -> list[bytes]:
    """`content` with one bit flipped, and cut, at so many places from its start to its end."""
    at = {*range(0, len(content), max(1, len(content) // places)), len(content) - 1}
    flipped = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] for i in sorted(at)]
    return [*flipped, *(content[:i] for i in sorted(at)[::3])]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# changed by accident


@pytest.mark.parametrize("form", FORMS)
def test_every_file_that_is_read_is_listed(folders: dict[str, Path], form: str) -> None:
    listed = set(json.loads((folders[form] / seal.NAME).read_text())["files"])
    here = {path.name for path in folders[form].iterdir()}
    if form == "merged":
        assert here - listed == {seal.NAME, "README.md", "recipe.yaml"}
    else:
        assert here - listed == {seal.NAME, "README.md", *TOKENIZER}


def refusal(folder: Path, expected: list[Any]) -> str | None:
    """What is said of a folder; null where it is the same as ever."""
    try:
        found = answers(folder)
    except LorakitError as error:
        return str(error)
    assert found == expected
    return None


@pytest.mark.parametrize("form", FORMS)
def test_a_byte_changed_anywhere_or_cut_off_is_refused_by_name_or_makes_no_difference(
    folders: dict[str, Path], form: str
) -> None:
    folder = folders[form]
    expected, listed = answers(folder), json.loads((folder / seal.NAME).read_text())["files"]
    for path in sorted(folder.iterdir()):
        content, strict = path.read_bytes(), path.name in listed and path.name not in FREE
        for other in changed(content, 30 if strict else 5):
            path.write_bytes(other)
            said = refusal(folder, expected)
            if path.name == seal.NAME:  # it may come to name a file that never was
                assert "is not as it was written" in str(said)
            elif strict:
                assert f"  {path.name}: " in str(said)
                assert "remove lorakit-manifest.json" in str(said)
            else:  # a base may have become another one's name
                assert said is None or path.name in said or "model.name" in said
        path.write_bytes(content)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_that_is_missing_is_named(folders: dict[str, Path], form: str) -> None:
    folder = folders[form]
    for name in json.loads((folder / seal.NAME).read_text())["files"]:
        kept = (folder / name).rename(folder.with_name("kept"))
        if name not in (CONFIG, "packed.json", "config.json"):  # by which a folder is known
            with pytest.raises(LorakitError, match=f"(?s)not as it was written.*{name}: missing"):
                answers(folder)
        kept.rename(folder / name)


def spoil(path: Path) -> None:
    """Another finite number in the last tensor, as a flipped bit would leave."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "pruned"),
        ("predict", "pruned", "a warm film"),
        ("prune", "pruned", "--out", "out"),
        ("prune", "packed", "--packed", "--out", "out"),
        ("merge", "packed", "--out", "out"),
        ("merge", "pruned", "--out", "out"),
        ("export", "pruned", "--out", "out"),
        ("eval", "pruned", "--force"),
    ],
)
def test_every_command_that_reads_an_adapter_refuses_one_of_another_number(
    folders: dict[str, Path], lorakit: Lorakit, command: tuple[str, ...]
) -> None:
    file = folders[command[1]] / (WEIGHTS if command[1] == "pruned" else "packed.safetensors")
    spoil(file)
    answer = lorakit(*command)
    assert (answer.code, answer.out) == (2, "")
    assert f"  {file.name}: other content than was written" in answer.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("changes", "spoilt"),
    [
        (("adapter.init_from=pruned",), "pruned"),
        (("adapter.ranks_from=pruned",), "pruned"),
        (("adapter.init_from=packed",), "packed"),
        (("model.name=merged",), "merged"),
        (("adapter.variant=pissa", "model.quantize=nf4", "adapter.source=merged"), "merged"),
    ],
)
def test_a_run_does_not_start_from_one_of_another_number(
    folders: dict[str, Path],
    made: Path,
    lorakit: Lorakit,
    changes: tuple[str, ...],
    spoilt: str,
) -> None:
    command = ("train", made / "lora.yaml", "--dry-run", "output_dir=new", *changes)
    assert lorakit(*command).code == 0
    (file,) = folders[spoilt].glob("*.safetensors")
    spoil(file)
    answer = lorakit(*command)
    assert (answer.code, answer.out) == (2, "")
    assert f"  {file.name}: other content than was written" in answer.err


def test_another_base_that_was_merged_and_is_another_now_is_refused(
    folders: dict[str, Path], lorakit: Lorakit
) -> None:
    spoil(folders["merged"] / "model.safetensors")
    answer = lorakit("eval", folders["pruned"], "--base", folders["merged"], "--force")
    assert answer.code == 2
    assert "model.name: merged is not as it was written" in answer.err


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_in_the_place_of_one_does_not_hold_the_reader_up(
    folders: dict[str, Path], make: Callable[[Path], None]
) -> None:
    for form, folder in folders.items():
        (folder / seal.NAME).unlink()
        make(folder / seal.NAME)
        with pytest.raises(LorakitError, match=r"lorakit-manifest\.json: no file"):
            answers(folder)
        if form == "packed":
            (folder / seal.NAME).rename(folder / "aside")
            (folder / "packed.safetensors").unlink()
            make(folder / "packed.safetensors")
            with pytest.raises(LorakitError, match=r"there is no file packed\.safetensors"):
                answers(folder)


# changed on purpose


def test_what_people_edit_in_an_adapter_makes_no_difference(folders: dict[str, Path]) -> None:
    folder = folders["pruned"]
    expected = answers(folder)
    (folder / "README.md").write_text("# Mine\n")
    edit(folder / CONFIG, base_model_name_or_path="some/base", inference_mode=False)
    edit(folder / "tokenizer_config.json", model_max_length=12)
    (folder / "added_tokens.json").write_text("{}")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"]["train"], recipe["output_dir"] = "moved/reviews.csv", "elsewhere"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert answers(folder) == expected
    recipe["task"]["max_length"] = 23
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(FolderError, match=r"recipe\.yaml: other content than was written"):
        open_trained(folder)


def test_a_base_that_moved_may_be_written_into_the_recipe(
    folders: dict[str, Path], tiny: Path
) -> None:
    folder = folders["pruned"]
    expected = answers(folder)
    shutil.copytree(tiny, "base")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"name: {tiny}", "name: base"))
    found = open_trained(folder)
    assert found.base.name == "base"
    assert logits(found.model, models.probe(found.model)).tolist() == expected[0]


def test_settings_that_peft_writes_anew_are_the_same_settings(folders: dict[str, Path]) -> None:
    folder = folders["pruned"]
    expected, before = answers(folder), (folder / CONFIG).read_bytes()
    peft.LoraConfig.from_pretrained(folder).save_pretrained(folder)
    assert (folder / CONFIG).read_bytes() != before
    assert answers(folder) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 3},
        {"use_rslora": True},
        {"alpha_pattern": {"query": 7}},
        {"task_type": "TOKEN_CLS"},
        {"lora_alphb": 1, "lora_alpha": 8.0},
    ],
)
def test_settings_that_make_another_update_are_refused_until_the_manifest_is_removed(
    folders: dict[str, Path], changes: dict[str, Any]
) -> None:
    folder = folders["pruned"]
    pairs, _ = pairs_at(folder)
    edit(folder / CONFIG, **changes)
    for read in (open_trained, pairs_at, ranks_at):
        with pytest.raises(FolderError, match=f"{CONFIG}: other content") as error:
            read(folder)
        assert "if that was meant, remove lorakit-manifest.json" in str(error.value)
    (folder / seal.NAME).unlink()
    others, _ = pairs_at(folder)
    scaled = any(not torch.equal(others[name].B, pair.B) for name, pair in pairs.items())
    assert scaled == ("task_type" not in changes)


def test_a_model_that_is_saved_anew_is_refused_until_the_manifest_is_removed(
    folders: dict[str, Path],
) -> None:
    folder = folders["merged"]
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.bias"] = tensors["classifier.bias"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LorakitError, match=r"remove lorakit-manifest\.json"):
        answers(folder)
    (folder / seal.NAME).unlink()
    assert answers(folder)


def test_what_a_later_version_reads_besides_is_no_difference(folders: dict[str, Path]) -> None:
    """Settings that are left at their defaults are not told, whichever there are."""
    found = json.loads(seal._settings(folders["pruned"] / CONFIG))
    assert found.keys() == {"peft_type", "task_type", "r", "lora_alpha", "modules_to_save"} | {
        "rank_pattern",
        "alpha_pattern",
    }


# not lorakit's, and what it costs


def test_a_manifest_of_others_means_nothing(folders: dict[str, Path]) -> None:
    for form, folder in folders.items():
        (folder / seal.NAME).unlink()
        (folder / manifest.NAME).write_text('{"dtype": "q4f16", "files": {"model.onnx": {}}}')
        assert answers(folder), form


def test_a_folder_is_hashed_once_in_a_process_while_it_stays_the_same(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, facts = [], manifest._facts
    monkeypatch.setattr(
        manifest, "_facts", lambda path, gists: hashed.append(path.name) or facts(path, gists)
    )
    seal._check.cache_clear()
    for _ in range(3):
        answers(folders["merged"])
    assert hashed.count("model.safetensors") == 1


def test_a_merged_model_is_hashed_once_when_it_is_written(
    made: Path, lorakit: Lorakit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, facts = [], manifest._facts
    monkeypatch.setattr(
        manifest, "_facts", lambda path, gists: hashed.append(path) or facts(path, gists)
    )
    assert lorakit("merge", made / "lora", "--out", tmp_path / "merged").code == 0
    assert [path.name for path in hashed].count("model.safetensors") == 1

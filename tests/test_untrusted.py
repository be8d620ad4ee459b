"""Folders from strangers: nothing in them runs, nothing leads out of them, nothing is believed."""

import json
import os
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Answer
from safetensors.torch import load_file, save_file

from lorakit import manifest, peft_format, seal
from lorakit.errors import FolderError

Lorakit = Callable[..., Answer]
ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lorakit").rglob("*.py"))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.fixture
def sentinel(tmp_path: Path) -> Path:
    """Is there after the test where a pickle has been opened."""
    return tmp_path / "pwned"


@pytest.fixture
def bomb(sentinel: Path) -> bytes:
    return pickle.dumps(Bomb(sentinel), protocol=2)  # torch's own


@pytest.fixture
def run(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, `run` in the working folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(done, tmp_path / "run")
    return Path("run")


@pytest.fixture
def adapter(run: Path) -> Path:
    """A copy of the PEFT folder, `adapter` in the working folder, as a stranger would send it."""
    found = Path(shutil.copytree(run / "pruned", "adapter"))
    (found / seal.NAME).unlink()
    return found


@pytest.fixture
def refused(lorakit: Lorakit) -> Callable[..., str]:
    """Types a command that must end in a message."""

    def typed(*arguments: object) -> str:
        answer = lorakit(*arguments)
        assert (answer.code, answer.out) == (2, ""), answer.err
        assert "Traceback" not in answer.err
        _, found, said = answer.err.rpartition("error: ")  # behind notes
        assert found
        return said.rstrip("\n")

    return typed


# nothing is run


def test_no_source_opens_a_pickle_or_runs_a_text() -> None:
    """`torch.load` only with weights_only=True; what transformers calls trust always off."""
    forbidden = (
        r"^\s*(import|from) (pickle|shelve|dill|joblib)\b(?! import UnpicklingError)",
        r"(?<![\w.])(eval|exec|__import__)\(",
        r"allow_pickle=True|yaml\.(load|unsafe_load|full_load)\(|UnsafeLoader|FullLoader",
        r"torch\.load\((?!.*weights_only=True)",
        r"trust_remote_code(?!=False)",
        r"shell=True|os\.system\(",
    )
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if any(re.search(pattern, line) for pattern in forbidden)
    ]
    assert found == []


def test_every_call_into_transformers_turns_foreign_code_off() -> None:
    """Left out, transformers asks on a terminal whether to run it."""
    for path in SOURCES:
        text = path.read_text()
        calls = re.findall(r"from_pretrained\((?:[^()]|\([^()]*\))*\)", text)
        for call in calls:
            if "FOLDER" not in call:  # what a model card tells others to type
                assert "trust_remote_code=False" in call, f"{path.name}: {call}"


@pytest.mark.parametrize("weights", [True, False], ids=["beside safetensors", "alone"])
def test_an_adapter_s_pickles_are_never_opened(
    adapter: Path, lorakit: Lorakit, sentinel: Path, bomb: bytes, weights: bool
) -> None:
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        (adapter / name).write_bytes(bomb)
    if not weights:
        (adapter / WEIGHTS).unlink()
    for arguments in (("eval", adapter), ("prune", adapter, "--out", "out")):
        answer = lorakit(*arguments)
        assert answer.code == (0 if weights else 2), answer.err
        if not weights:
            assert "adapter_model.bin is a pickle, which may run code" in answer.err
    assert not sentinel.exists()


@pytest.mark.parametrize("file", ["adapter", "head", "state"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint_s_file_that_became_a_pickle_is_refused(
    run: Path, refused: Callable[..., str], sentinel: Path, bomb: bytes, file: str, sealed: bool
) -> None:
    folder = run / "checkpoints" / "step-000001"
    (folder / f"{file}.safetensors").write_bytes(bomb)
    if sealed:
        (folder / manifest.NAME).unlink()
        manifest.write(folder)
    (run / "checkpoints" / "last").write_text("step-000001")
    if file != "state" or not sealed:
        assert f"{file}.safetensors" in refused("prune", folder, "--out", "out")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    recipe = re.sub("output_dir: .*", "output_dir: run", (run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(recipe)
    (folder / "recipe.yaml").write_text(recipe)
    if sealed:
        (folder / manifest.NAME).unlink()
        manifest.write(folder)
    assert f"{file}.safetensors" in refused("train", run, "--resume")
    assert not sentinel.exists()


def test_a_base_model_s_pickle_runs_no_code(
    adapter: Path, tiny: Path, refused: Callable[..., str], sentinel: Path, bomb: bytes
) -> None:
    base = Path(shutil.copytree(tiny, "base"))
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(bomb)
    said = refused("eval", adapter, "--base", base)
    assert said.startswith("model.name: 'base' cannot be loaded: ")
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_a_base_model_s_own_code_is_not_run_and_nobody_is_asked(
    adapter: Path,
    tiny: Path,
    lorakit: Lorakit,
    sentinel: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "yes")  # as a hurried person would
    base = Path(shutil.copytree(tiny, "base"))
    (base / "custom.py").write_text(f"open({str(sentinel)!r}, 'w')\n")
    name = "config.json" if kind == "config" else "tokenizer_config.json"
    given = json.loads((base / name).read_text())
    maps = {"AutoConfig": "custom.C", "AutoModelForSequenceClassification": "custom.M"}
    given["auto_map"] = maps if kind == "config" else {"AutoTokenizer": ["custom.T", "custom.T"]}
    (base / name).write_text(json.dumps({**given, "tokenizer_class": "T", "model_type": "own"}))
    answer = lorakit("eval", adapter, "--base", base)
    assert not sentinel.exists()
    if kind == "config":  # a tokenizer has a general class besides
        assert (answer.code, answer.out) == (2, ""), answer.err
        assert answer.err.startswith("error: model.name: 'base' cannot be loaded: ")


# nothing leads out


def below(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_names_that_are_paths_write_nothing_outside(
    adapter: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    tensors = load_file(adapter / WEIGHTS)
    for side in ("A", "B"):
        key = f"{QUERY}.lora_{side}.weight"
        tensors[f"base_model.model.../../../outside/x.lora_{side}.weight"] = tensors[key].clone()
    save_file(tensors, adapter / WEIGHTS)
    before = below(tmp_path)
    assert "no such module in the base" in refused("prune", adapter, "--out", "out")
    assert below(tmp_path) == before


def test_weights_behind_a_link_are_read_as_safetensors_and_never_written(
    adapter: Path, lorakit: Lorakit, refused: Callable[..., str], tmp_path: Path
) -> None:
    """The hub's own cache is made of such links; what they lead to is only ever parsed."""
    outside = tmp_path / "outside" / "blob"
    outside.parent.mkdir()
    (adapter / WEIGHTS).rename(outside)
    (adapter / WEIGHTS).symlink_to(outside)
    before = outside.read_bytes()
    assert lorakit("prune", adapter, "--out", "out").code == 0
    assert not (tmp_path / "out" / WEIGHTS).is_symlink()
    assert outside.read_bytes() == before
    outside.write_text("root:x:0:0\n")
    said = refused("prune", adapter, "--out", "other")
    assert "root" not in said


def test_weights_that_are_no_file_do_not_hold_the_reader_up(
    adapter: Path, refused: Callable[..., str]
) -> None:
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    assert f"there is no file {WEIGHTS}" in refused("prune", adapter, "--out", "out")


def test_a_run_s_pointer_does_not_lead_out_of_it(run: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(run / "checkpoints" / "step-000001", "elsewhere")
    for name in ("best", "last"):
        (run / "checkpoints" / name).write_text("../../elsewhere")
    assert "no checkpoint here" in refused("prune", run, "--out", "out")


ESCAPE = "\x1b[2J"


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": ESCAPE},
        {"peft_type": ESCAPE},
        {"r": ESCAPE},
        {"rank_pattern": {ESCAPE: "x"}},
        {"rank_pattern": {f"({ESCAPE}": 1}},
        {"modules_to_save": {ESCAPE: 1}},
    ],
)
def test_a_terminal_is_not_written_to_by_a_setting(adapter: Path, changes: dict[str, Any]) -> None:
    edit(adapter, **changes)
    with pytest.raises(FolderError) as caught:
        peft_format.read(adapter)
    assert str(caught.value).replace("\n", "").isprintable()


def test_a_terminal_is_not_written_to_by_a_name(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({**tensors, f"{ESCAPE}x.lora_A.weight": torch.ones(1, 1)}, adapter / WEIGHTS)
    with pytest.raises(FolderError, match="no name of a module") as caught:
        peft_format.read(adapter)
    assert str(caught.value).replace("\n", "").isprintable()


# nothing is believed: settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": "8"}, "r: '8': expected a whole number"),
        ({"r": 0}, "r: 0: expected a number above 0"),
        ({"r": 2.5}, "r: 2.5: expected a whole number"),
        ({"r": 3}, "A and B have rank 2, adapter_config.json says 3"),
        ({"r": 10**400}, "expected a number below 2147483648"),
        ({"rank_pattern": {"query": 10**400}}, "expected a number below 2147483648"),
        ({"lora_alpha": "16"}, "lora_alpha: '16': expected a number"),
        ({"lora_alpha": [16]}, "lora_alpha: [16]: expected a number"),
        ({"lora_alpha": True}, "lora_alpha: true: expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: .nan: expected a finite number"),
        ({"lora_alpha": 1e300}, "B times its scale, 1e+300 over the rank, is not finite"),
        ({"rank_pattern": []}, "rank_pattern: []: expected a mapping of keys to values"),
        ({"rank_pattern": {"query": "x"}}, "rank_pattern.query: 'x': expected a whole number"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern.query: 0: expected a number above 0"),
        ({"rank_pattern": {"query": 7}}, "query: A and B have rank 2, adapter_config.json says 7"),
        ({"rank_pattern": {"(": 1}}, "rank_pattern: '(': no pattern: missing )"),
        ({"alpha_pattern": {"a**": 1}}, "alpha_pattern: 'a**': no pattern: multiple repeat"),
        ({"alpha_pattern": {"query": None}}, "alpha_pattern.query: null: expected a number"),
        ({"modules_to_save": "classifier"}, "modules_to_save: 'classifier': expected a list"),
        ({"modules_to_save": [1]}, "modules_to_save.0: 1: expected text"),
        ({"modules_to_save": [""]}, "modules_to_save.0: ''"),
        ({"peft_type": None}, "peft_type: null: expected text"),
        ({"task_type": 1}, "task_type: 1: expected text"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path: [a]: expected text"),
        ({"use_rslora": "no"}, "use_rslora: 'no': expected true or false"),
        ({"bias": {}}, "bias: {}: expected text"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_file_and_key(
    adapter: Path, changes: dict[str, Any], said: str
) -> None:
    edit(adapter, rank_pattern=None, alpha_pattern=None)
    edit(adapter, **changes)
    with pytest.raises(FolderError) as caught:
        peft_format.read(adapter)
    assert said in str(caught.value)
    assert CONFIG in str(caught.value) or "scale" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "EOF"),
        (b"[]", "[]: expected a mapping of keys to values"),
        (b"{}", "peft_type: Field required"),
        (b'{"a": ' * 10_000, "recursion limit"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion limit"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "number out of range"),
        (b" " * 5_000_000, "longer than 4,194,304 bytes"),
        (b"\xff\xfe{}", "expected value"),
    ],
)
def test_settings_that_are_no_settings(adapter: Path, text: bytes, said: str) -> None:
    (adapter / CONFIG).write_bytes(text)
    with pytest.raises(FolderError) as caught:
        peft_format.read(adapter)
    assert said in str(caught.value)
    assert str(adapter / CONFIG) in str(caught.value)


def test_all_faults_of_the_settings_are_told_together(adapter: Path) -> None:
    edit(adapter, r="x", lora_alpha=None, modules_to_save=3)
    with pytest.raises(FolderError, match="3 faults"):
        peft_format.read(adapter)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card.pop("labels"), "labels: Field required"),
        (lambda card: card.update(labels="bad"), "labels: Input should be a valid array"),
        (lambda card: card.update(scores=[1]), "scores: Input should be an object"),
        (lambda card: card.update(bytes=[1]), "bytes.1: Field required"),
        (lambda card: card.update(start={"x": None}), "start.x: Input should be a valid integer"),
    ],
)
def test_a_provenance_that_cannot_be_is_refused_by_file_and_key(
    adapter: Path,
    refused: Callable[..., str],
    change: Callable[[dict[str, Any]], Any],
    said: str,
) -> None:
    card = json.loads((adapter / "lorakit.json").read_text())
    change(card)
    (adapter / "lorakit.json").write_text(json.dumps(card))
    told = refused("eval", adapter)
    assert told.startswith("adapter/lorakit.json cannot be read: 1 fault")
    assert said in told


def test_keys_of_other_versions_are_taken(adapter: Path) -> None:
    edit(adapter, peft_version="9.9", corda_config=None, use_something_new=False)
    assert peft_format.read(adapter).pairs


# nothing is believed: weights


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "holds nan or inf"),
        (float("inf"), "holds nan or inf"),
        (torch.int8, "torch.int8; expected fractions"),
        (torch.bool, "torch.bool; expected fractions"),
        (torch.complex64, "torch.complex64; expected fractions"),
        ((0, 16), "A (0, 16) and B (16, 2) make no product"),
        ((2, 4, 4), "A (2, 4, 4) and B (16, 2) make no product"),
        ((1, 16), "A (1, 16) and B (16, 2) make no product"),
    ],
)
@pytest.mark.parametrize("other", [False, True], ids=["in a pair", "in the head"])
def test_weights_that_cannot_be_are_refused_by_name(
    adapter: Path, value: Any, said: str, other: bool
) -> None:
    if other and isinstance(value, tuple):
        pytest.skip("the head's shape is the base model's affair")
    key = "base_model.model.classifier.weight" if other else f"{QUERY}.lora_A.weight"
    tensors = load_file(adapter / WEIGHTS)
    if isinstance(value, float):
        tensors[key][0, 0] = value
    elif isinstance(value, torch.dtype):
        tensors[key] = tensors[key].to(value)
    else:
        tensors[key] = torch.ones(value)
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(FolderError) as caught:
        peft_format.read(adapter)
    assert said in str(caught.value)
    assert key.split(".")[-3 if other else -4] in str(caught.value)


def test_a_name_that_stands_twice_is_refused(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    key = f"{QUERY}.lora_A.weight"
    save_file(
        {**tensors, key.removeprefix("base_model.model."): tensors[key].clone()}, adapter / WEIGHTS
    )
    with pytest.raises(FolderError, match=r"query\.lora_A\.weight: twice"):
        peft_format.read(adapter)


def lie(path: Path, change: Callable[[dict[str, Any]], Any], length: int = 0) -> None:
    """Changes the header of a safetensors file, and by `length` what is said of its size."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) + length) + text + data[8 + size :])


KEY = f"{QUERY}.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "length"),
    [
        (lambda h: None, 2**62),
        (lambda h: None, -5),
        (lambda h: None, 10**6),
        (lambda h: h[KEY].update(shape=[2**40, 2**40]), 0),
        (lambda h: h[KEY].update(shape=[4, 16]), 0),
        (lambda h: h[KEY].update(shape=[-2, -16]), 0),
        (lambda h: h[KEY].update(dtype="F64"), 0),
        (lambda h: h[KEY].update(dtype="object"), 0),
        (lambda h: h[KEY].update(data_offsets=[0, 2**60]), 0),
        (lambda h: h[KEY].update(data_offsets=[2**60, 2**60 + 128]), 0),
        (lambda h: h[KEY].update(data_offsets=[128, 0]), 0),
        (lambda h: h.pop(KEY), 0),
        (lambda h: h.update(x=h[KEY]), 0),
    ],
)
def test_a_header_that_lies_is_refused(
    adapter: Path, change: Callable[[dict[str, Any]], Any], length: int
) -> None:
    lie(adapter / WEIGHTS, change, length)
    with pytest.raises(FolderError, match=WEIGHTS):
        peft_format.read(adapter)

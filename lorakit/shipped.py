"""The recipes that come with lorakit."""

from importlib.resources import files
from pathlib import Path

from lorakit.disk import refuse_existing, write_text
from lorakit.errors import RecipeError, no_such

SCHEMA = "recipe.schema.json"


def folder() -> Path:
    """Inside the installed package; in a checkout, beside it."""
    inside = Path(str(files("lorakit"))) / "recipes"
    return inside if inside.is_dir() else inside.parents[1] / "recipes"


def recipes() -> dict[str, Path]:
    """Name -> file, in alphabetical order."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def find(name: str) -> Path:
    """The recipe called `name`.

    Raises:
        RecipeError: there is none.

    """
    found = recipes().get(name.removesuffix(".yaml"))
    if found is None:
        raise RecipeError(no_such("recipe", name, recipes()))
    return found


def summary(path: Path) -> str:
    """The first sentence of a recipe's header."""
    words = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines()]
    return next(line for line in words if line and not line.startswith("yaml-language-server"))


def copy(name: str, to: Path) -> Path:
    """Copies a recipe into the folder or to the file `to`, and the schema its first line names.

    Raises:
        FolderError: the file exists already.

    """
    source = find(name)
    target = to / source.name if to.is_dir() else to
    refuse_existing(target, "Name another file.")
    write_text(target, source.read_text(encoding="utf-8"))
    schema = target.parent / SCHEMA
    if not schema.exists():
        write_text(schema, (folder() / SCHEMA).read_text(encoding="utf-8"))
    return target

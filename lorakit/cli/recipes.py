"""`lorakit schema` and `lorakit recipes`."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import Json

app = typer.Typer(
    no_args_is_help=True,
    help="The recipes that come with lorakit.",
    epilog="To start from one:  lorakit recipes copy quickstart mine.yaml",
)


def schema() -> None:
    """Print a recipe's JSON schema, by which editors complete.

    For example:

      lorakit schema > recipe.schema.json
    """
    from lorakit.commands import recipes

    recipes.schema()


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Name every recipe with its first line.

    For example:

      lorakit recipes list
    """
    from lorakit.commands import recipes

    recipes.list_recipes(as_json)


@app.command("show")
def show_recipe(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As `lorakit recipes list` names it.")
    ],
) -> None:
    """Print a recipe.

    For example:

      lorakit recipes show quickstart
    """
    from lorakit import shipped

    typer.echo(shipped.find(name).read_text(encoding="utf-8"), nl=False)


@app.command("copy")
def copy_recipe(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As `lorakit recipes list` names it.")
    ],
    to: Annotated[Path, typer.Argument(metavar="TO", help="A folder, or a file to make.")] = Path(),
) -> None:
    """Copy a recipe to be changed, and its schema beside it.

    For example:

      lorakit recipes copy quickstart mine.yaml
    """
    from lorakit import shipped

    typer.echo(shipped.copy(name, to))

"""`lorakit doctor` and `lorakit env`."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import Json


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(metavar="RECIPE", help="A recipe, or a run folder for its recipe."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE|~KEY", help="Keys to set, or to put back to their defaults."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look whether this machine, and a recipe on it, will work. Ends in 1 if something will not.

    ✓ is well, ! is to be known, ✗ would fail.

    For example:

      lorakit doctor

      lorakit doctor recipes/quickstart.yaml train.batch_size=64
    """
    from lorakit.commands import machine

    raise typer.Exit(machine.examine(recipe, overrides or [], as_json))


def env() -> None:
    """Print versions and hardware as JSON: what a bug report needs, without secrets or paths.

    For example:

      lorakit env
    """
    from lorakit.commands import machine

    machine.environment()

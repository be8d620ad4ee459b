"""`lorakit train`."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import Force, Json


def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A recipe, or a run folder for its recipe.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE|~KEY", help="Keys to set, or to put back to their defaults."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be checked; train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of output_dir.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train the adapter that a recipe describes.

    What it leaves behind stands in the recipe's output_dir, which must be new.

    For example:

      lorakit train recipes/quickstart.yaml

      lorakit train recipes/quickstart.yaml train.lr=3e-4 output_dir=runs/try

      lorakit train recipes/quickstart.yaml --dry-run

      lorakit train runs/quickstart --resume
    """
    from lorakit.commands import training

    if dry_run:
        training.dry_run(recipe, overrides or [], as_json)
    else:
        training.train(recipe, overrides or [], resume, force, as_json)

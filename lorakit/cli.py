"""The command line. Every command reads its arguments, calls one function, shows the answer.

Nothing heavy is imported before a command runs: `--help` must not wait for torch. Help is plain
text for the same reason: Rich, with its Markdown reader, takes as long again as all the rest.
"""

from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from lorakit import __version__

app = typer.Typer(
    name="lorakit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A first run, without any hub:  lorakit train recipes/quickstart.yaml",
)
recipes_app = typer.Typer(
    no_args_is_help=True,
    help="The recipes that come with lorakit.",
    epilog="To start from one:  lorakit recipes copy quickstart mine.yaml",
)
app.add_typer(recipes_app, name="recipes")

FORBIDDEN_OR_FULL = (EACCES, EPERM, EROFS, ENOSPC, EDQUOT)
"""What a disk may answer anywhere, whatever was looked at before."""

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Which = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="best|last|STEP",
        help="Which checkpoint of a run. Default: the best, else the last.",
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="Base model, where the adapter names none or one that moved.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Low-rank fine-tuning that learns how much rank a model needs, and where."""


@app.command()
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
    from lorakit import commands

    if dry_run:
        commands.dry_run(recipe, overrides or [], as_json)
    else:
        commands.train(recipe, overrides or [], resume, as_json)


@app.command()
def prune(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A run, a checkpoint, a PEFT LoRA or packed folder."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. Default: `pruned` in the run."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(metavar="RANK", help="Also cut every module to this rank, by SVD.")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Also keep only this share of each module's energy."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Also keep only this share of the start's budget, over all modules.",
        ),
    ] = None,
    of: Annotated[
        str | None,
        typer.Option(metavar="ranks|parameters", help="What --keep counts. Default: ranks."),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="pattern|uniform",
            help="A rank for each module, or zeros up to one rank for readers of no patterns. "
            "Default: pattern.",
        ),
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Write integer codes at their learned bits, for lorakit alone; to `packed`.",
        ),
    ] = False,
    which: Which = None,
    base: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Write an adapter as a small, standard PEFT folder.

    Without --rank, --energy or --keep only dead ranks leave, and nothing changes. The folder is
    read back into a fresh base model and compared before it is called done.

    Where bit-widths were learned, --packed keeps the codes as they are: smaller still, with the
    very same logits, and read by `lorakit eval` and `lorakit prune` alone.

    For example:

      lorakit prune runs/quickstart

      lorakit prune runs/quickstart --keep 0.25 --out quarter

      lorakit prune some/peft/folder --energy 0.99 --out smaller

      lorakit prune runs/blora_bbc --packed
    """
    from lorakit import commands

    commands.prune(path, out, (rank, energy, keep, of), layout, packed, which, base, as_json)


@app.command("eval")
def evaluate(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="PATH",
            help="A run, a checkpoint, a PEFT or packed folder. Default: the newest run in runs/.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="A task, such as glue/sst2. Default: the run's own."),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder in GLUE's layout, instead of the hub."),
    ] = None,
    split: Annotated[
        str, typer.Option(metavar="SPLIT", help="train, validation; MNLI: validation_mismatched.")
    ] = "validation",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first so many rows.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Rows in one forward pass.")
    ] = 64,
    precision: Annotated[
        str, typer.Option(metavar="fp32|bf16|auto", help="What the base is stored in.")
    ] = "fp32",
    output_path: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the result to this JSON file.")
    ] = None,
    which: Which = None,
    base: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Score a run, a checkpoint, a PEFT or packed folder.

    For example:

      lorakit eval --task glue/sst2

      lorakit eval runs/quickstart/pruned --output-path scores.json

      lorakit eval runs/blora_bbc/packed

      lorakit eval some/peft/folder --task glue/sst2 --data-dir data/glue
    """
    from lorakit import commands
    from lorakit.evaluate import Wanted

    wanted = Wanted(task, data_dir, split, limit, batch_size)
    commands.evaluate(path, wanted, precision, output_path, which, base, as_json)


@app.command()
def schema() -> None:
    """Print a recipe's JSON schema, by which editors complete.

    For example:

      lorakit schema > recipe.schema.json
    """
    from lorakit import commands

    commands.schema()


@recipes_app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Name every recipe with its first line.

    For example:

      lorakit recipes list
    """
    from lorakit import commands

    commands.list_recipes(as_json)


@recipes_app.command("show")
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


@recipes_app.command("copy")
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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. A user's error is one message and exit code 2."""
    from lorakit.errors import LorakitError

    try:
        app(arguments)
    except LorakitError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in FORBIDDEN_OR_FULL:
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}.")


def _fail(message: str) -> NoReturn:
    typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    raise SystemExit(2) from None

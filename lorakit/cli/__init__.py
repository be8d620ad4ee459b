"""The command line. Every command reads its arguments, calls one function, shows the answer.

Nothing heavy is imported before a command runs: `--help` must not wait for torch. Help is plain
text for the same reason: Rich, with its Markdown reader, takes as long again as all the rest.
"""

import gc
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from typing import Annotated, NoReturn

import typer

from lorakit import __version__
from lorakit.cli import adapters, answers, machine, recipes, training

app = typer.Typer(
    name="lorakit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A first run, without any hub:  lorakit train recipes/quickstart.yaml",
)
app.command()(training.train)
app.command()(adapters.prune)
app.command()(adapters.merge)
app.command()(adapters.export)
app.command("eval")(answers.evaluate)
app.command()(answers.predict)
app.command()(machine.doctor)
app.command()(machine.env)
app.command()(recipes.schema)
app.add_typer(recipes.app, name="recipes")

COLLECT_AFTER = 50_000
"""Objects between two searches for garbage, Python's own being 700. What torch and transformers
make when they are imported stays: to look through it again and again took 1.1 of 8.4 seconds."""
INTERRUPTED = 130
"""What typer makes of KeyboardInterrupt."""
FORBIDDEN_OR_FULL = (EACCES, EPERM, EROFS, ENOSPC, EDQUOT)
"""What a disk may answer anywhere, whatever was looked at before."""


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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. A user's error is one message and exit code 2.

    A run that a signal has stopped ends as a shell has it: 130 for SIGINT, 143 for SIGTERM. Where
    Ctrl-C finds no run to save, it is said that nothing is half-written.
    """
    from lorakit.errors import LorakitError, Stopped

    gc.set_threshold(COLLECT_AFTER)
    try:
        app(arguments)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            typer.echo("interrupted; nothing is left half-written", err=True)
        raise
    except Stopped as told:
        typer.echo(str(told), err=True)
        raise SystemExit(told.exit_code) from None
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

"""`lorakit eval` and `predict`: what a finished adapter answers."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import BaseModel, Force, Json, Precision, Which


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
        typer.Option(
            "--task",
            "--tasks",
            metavar="TASK",
            help="A task, such as glue/sst2, or several with commas: of GLUE's those that have the "
            "same labels, or of lm-evaluation-harness's. Default: the run's own.",
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A folder in GLUE's layout, instead of the hub."),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            metavar="SPLIT",
            help="train, validation, test; MNLI: validation_mismatched, test_mismatched; several "
            "with commas.",
        ),
    ] = "validation",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first so many rows.")
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", "--batch_size", min=1, metavar="N", help="Rows in one forward pass."
        ),
    ] = 64,
    precision: Precision = "fp32",
    output_path: Annotated[
        Path | None,
        typer.Option(
            "--output-path",
            "--output_path",
            metavar="FILE",
            help="Also write the result to this JSON file.",
        ),
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write GLUE's submission file of the split to this folder instead."
        ),
    ] = None,
    few_shot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot",
            "--num_fewshot",
            min=0,
            metavar="N",
            help="Examples before each question of the harness. Default: as each task has it.",
        ),
    ] = None,
    include: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            "--include_path",
            metavar="DIR",
            help="A folder with tasks for the harness, in its YAML.",
        ),
    ] = None,
    which: Which = None,
    base: BaseModel = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Score a run, a checkpoint, a PEFT or packed folder.

    Tasks that are not lorakit's own go to lm-evaluation-harness, with causal language models;
    `commonsense` is six of them: arc_challenge, arc_easy, boolq, hellaswag, openbookqa, piqa.

    For example:

      lorakit eval --task glue/sst2

      lorakit eval runs/quickstart/pruned --output-path scores.json

      lorakit eval runs/blora_bbc/packed

      lorakit eval some/peft/folder --task glue/sst2 --data-dir data/glue

      lorakit eval runs/mnli --split validation,validation_mismatched

      lorakit eval runs/mnli --task glue/mnli,glue/ax

      lorakit eval runs/rte --split test --predictions submission

      lorakit eval runs/alpaca --task commonsense --limit 100 --batch-size 8
    """
    from lorakit.commands import answers
    from lorakit.commands.opening import Source
    from lorakit.evaluate import Wanted

    wanted = Wanted(task, data_dir, split, limit, batch_size, few_shot, include)
    source = Source(path, which, base, force)
    answers.evaluate(source, wanted, precision, output_path, predictions, as_json)


def predict(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A run, a checkpoint, a PEFT or packed folder."),
    ],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="Texts to answer; - reads them from standard input."),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="The second text of a pair; once for every TEXT."),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Texts in a .txt, a line each (a tab divides a pair), or in columns of a .csv, "
            ".tsv, .json, .jsonl or .parquet.",
        ),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Column of the text in FILE, twice for a pair. Default: as in training, or found.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the answers to this .jsonl, .csv or .tsv, as they come."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of a text that the model writes. Default: 128."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="text|prompt|alpaca|chat",
            help="How a text is prompted, for models that write. Default: as in the recipe.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Tokens of a text to label. Default: as in training."
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Texts in one forward pass.")
    ] = 32,
    precision: Precision = "fp32",
    which: Which = None,
    base: BaseModel = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Answer texts: labels with probabilities, numbers, tags, or text that the model writes.

    Texts are typed, or read from a file or standard input. A file may be of any length: answers go
    out while it is read, with all columns of the file beside them, and the file to write is there
    when all are.

    For example:

      lorakit predict runs/quickstart "Shares of the chip maker rose."

      lorakit predict runs/quickstart --file articles.csv --out topics.csv

      lorakit predict runs/rte "It rained all day." --pair "The day was dry."

      lorakit predict runs/alpaca "Name three rivers." --max-new-tokens 64
    """
    from lorakit.commands import answers
    from lorakit.commands.opening import Source
    from lorakit.inputs import Given
    from lorakit.predict import Settings

    given = Given(tuple(texts or ()), tuple(pair or ()), file, tuple(column or ()) or None)
    settings = Settings(batch_size, max_length, max_new_tokens, form)
    source = Source(path, which, base, force)
    answers.predict(source, given, out, settings, precision, as_json)

"""Options that several commands have."""

from typing import Annotated

import typer

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
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Go on over another base model than it was trained on; with --resume, other rows too.",
    ),
]
Precision = Annotated[
    str, typer.Option(metavar="fp32|bf16|auto", help="What the base is stored in.")
]

"""`lorakit prune`, `merge` and `export`: what is made of a finished adapter."""

from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.options import BaseModel, Force, Json, Which


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
    force: Force = False,
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
    from lorakit.commands import adapters
    from lorakit.commands.opening import Source

    source = Source(path, which, base, force)
    adapters.prune(source, out, (rank, energy, keep, of), layout, packed, as_json)


def merge(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A run, a checkpoint, a PEFT LoRA or packed folder."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write. Default: `merged` in the run."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="auto|fp32|bf16|fp16",
            help="What the weights are stored in. auto: what the base's own files are.",
        ),
    ] = "auto",
    which: Which = None,
    base: BaseModel = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write base and adapter as one model, which transformers loads alone.

    The update is added to the weights in float32, those of a quantised base dequantised; the head
    and all that was trained whole go along. The folder is read back by transformers and compared
    with the model it was made of before it is called done. It is as large as the base.

    For example:

      lorakit merge runs/quickstart

      lorakit merge some/peft/folder --dtype bf16 --out merged
    """
    from lorakit.commands import adapters
    from lorakit.commands.opening import Source

    adapters.merge(Source(path, which, base, force), out, dtype, as_json)


def export(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A run, a checkpoint, a PEFT LoRA or packed folder."),
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="peft|gguf",
            help="PEFT's folder, as prune writes it; or llama.cpp's adapter file.",
        ),
    ] = "peft",
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="What to write. Default: `pruned` or `adapter.gguf` in the run."
        ),
    ] = None,
    which: Which = None,
    base: BaseModel = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter, nothing cut, in another program's format.

    A .gguf adapter goes with a .gguf of the same base: llama-cli -m base.gguf --lora adapter.gguf.
    It holds pairs alone, of causal language models whose names llama.cpp shares: Llama, Mistral,
    Qwen 2 and 3, Gemma 1 to 3. It is read back and compared before it is called done.

    For example:

      lorakit export runs/alpaca --format gguf

      lorakit export runs/quickstart --format peft --out adapter
    """
    from lorakit.commands import adapters
    from lorakit.commands.opening import Source

    adapters.export(Source(path, which, base, force), form, out, as_json)

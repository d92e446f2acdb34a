"""``vllm-fox convert``: make a checkpoint that evicts tokens ready to be served."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import WRONG, CommandError
from .options import number, whole


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint.", metavar="SOURCE", show_default=False)],
    out: Annotated[
        Path, typer.Argument(help="Folder to write; it must not exist.", metavar="OUT", show_default=False)
    ],
    predictor: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a KVzap predictor for an unchanged model.", metavar="FOLDER", show_default=False
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            parser=number("--threshold", -1e30, 1e30, "-4"),
            help="Evict tokens with a lower predicted score; with --predictor.",
            metavar="X",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            help="Tokens for which an evicted one stays, 128 by default; with --predictor.",
            parser=whole("--window", 1),
            metavar="W",
            show_default=False,
        ),
    ] = None,
    original: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the model beside which the predictor was trained, if SOURCE is quantised; with "
            "--predictor.",
            metavar="FOLDER",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a checkpoint that evicts tokens ready to be served.

    SOURCE is a checkpoint with Dynamic Memory Sparsification (DMS) as NVIDIA's Model-Optimizer saves it, or any
    Llama, Mistral, Qwen2 or Qwen3 to go with a KVzap predictor. Weights are copied file by file; the model is never
    in memory as a whole.
    """
    from vllm_fox.families.evicting.convert import convert as write

    try:
        for line in write(source, out, predictor, threshold, window, original):
            print(line)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), WRONG) from None

"""Parsers of options, whose errors name the option, what was given and what it may be; and options that several
commands have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import typer

from .errors import CommandError

MOST = 2**31 - 1
"""The largest whole number that an option takes unless it says otherwise."""


def whole(option: str, least: int, most: int = MOST) -> Callable[[str | int], int]:
    """Make the parser of an option that takes a whole number from ``least`` to ``most``."""

    def read(text: str | int) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise CommandError(f"{option} is {text}: give a whole number from {least} to {most}.")
        return value

    return read


def number(option: str, least: float, most: float, example: str) -> Callable[[str | float], float]:
    """Make the parser of an option that takes a number from ``least`` to ``most``."""

    def read(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:  # NaN is not between them either
            raise CommandError(f"{option} is {text}: give a number from {least:g} to {most:g}, such as {example}.")
        return value

    return read


def choice(option: str, *allowed: str) -> Callable[[str], str]:
    """Make the parser of an option that takes one of some words."""

    def read(text: str) -> str:
        if text not in allowed:
            raise CommandError(f"{option} is {text}: give one of {', '.join(allowed)}.")
        return text

    return read


Model = Annotated[
    str,
    typer.Argument(
        help="Folder of a checkpoint, or its name in the Hugging Face cache.", metavar="MODEL", show_default=False
    ),
]
Memory = Annotated[
    float | None,
    typer.Option(
        parser=number("--memory", 0.1, 1e6, "80"),
        help="GiB of a GPU's memory.",
        metavar="GIB",
        show_default=False,
    ),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option(
        parser=whole("--tokens", 1),
        help="Lengths of requests, several in a row.",
        metavar="N...",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        parser=choice("--dtype", "bfloat16", "float16", "float32"),
        help="As it will be served: bfloat16, float16 or float32. As vLLM chooses it unless given.",
        metavar="DTYPE",
        show_default=False,
    ),
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(
        parser=whole("--max-model-len", 1),
        help="As it will be served: bounds hold for so many tokens. The config's longest context unless given.",
        metavar="N",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]

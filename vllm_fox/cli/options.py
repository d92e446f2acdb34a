"""Types of options that are numbers: an error names the option, what was given, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable

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

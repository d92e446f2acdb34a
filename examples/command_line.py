"""Command lines of the examples and benchmarks: every option says what it may be, and a refusal is one sentence."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MOST = 2**31 - 1
"""The largest whole number that an option takes unless it says otherwise."""


class Refused(SystemExit):
    """The command cannot be right: exit code 2. Its sentence is on standard error already."""

    def __init__(self, sentence: str) -> None:
        super().__init__(2)
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


LARGEST = 1e30
"""No option may be a greater number: float32 holds this one and some multiples of it."""


def refuse(sentence: str) -> NoReturn:
    """Print the sentence on standard error and raise :class:`Refused`."""
    print(sentence, file=sys.stderr)
    raise Refused(sentence)


class Parser(argparse.ArgumentParser):
    """A parser of command lines whose errors are one sentence, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command. What a type of this module says is made to begin with the option's name."""
        refuse(f"{self.prog}: " + re.sub(r"^argument (\S+): is ", r"\1 is ", message))


def integer(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that takes a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        allowed = f"from {least} to {most}"
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}: it must be a whole number {allowed}.") from None
        if not least <= value <= most:
            if value < least and most == MOST:
                allowed = f"at least {least}"
            raise argparse.ArgumentTypeError(f"is {text}: it must be {allowed}.")
        return value

    return read


def number(allowed: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """The type of an option that takes a finite number. ``wanted`` completes "it must be"."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}: it must be {wanted}.") from None
        if not (math.isfinite(value) and allowed(value)):
            raise argparse.ArgumentTypeError(f"is {text}: it must be {wanted}.")
        if abs(value) > LARGEST:
            raise argparse.ArgumentTypeError(f"is {text}: it must be at most {LARGEST:g}.")
        return value

    return read


positive_int = integer(1)
non_negative_int = integer(0)
seed_number = integer(0, 2**32 - 1)
positive_float = number(lambda value: value > 0, "a number above 0")
non_negative_float = number(lambda value: value >= 0, "a number from 0 on")
fraction = number(lambda value: 0 < value <= 1, "a number above 0 and at most 1")
inner_fraction = number(lambda value: 0 < value < 1, "a number above 0 and below 1")


def utf8(text: str) -> str:
    """The type of an option that takes text for a model."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"is {text!r}: it must be UTF-8.") from None
    return text


def existing_file(text: str) -> Path:
    """The type of an option that takes a file that is read."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"is {text}: it must be a file.")
    return Path(text)


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that takes a JSON object."""
    wanted = 'it must be a JSON object, such as {"name": 1}'
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"is {text!r}: {wanted} ({error}).") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"is {text!r}: {wanted}.")
    return value


def check_engine_args(parser: Parser, args: argparse.Namespace) -> None:
    """Refuse --engine-args that say what an option of the script says."""
    for name in args.engine_args:
        if hasattr(args, name):
            parser.error(f"--engine-args has {name}: give --{name.replace('_', '-')} instead.")

"""What benchmarks have of the examples: one set of types for options, and files that are whole or not there."""

from __future__ import annotations

import argparse
from pathlib import Path

from command_line import (
    Parser,
    existing_file,
    fraction,
    inner_fraction,
    integer,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    refuse,
    seed_number,
)
from text_corpus import find_texts
from whole_files import (
    lines_of,
    pass_over,
    read_record,
    read_records,
    read_text,
    replacing,
    settle_all,
    write_whole,
)

__all__ = [
    "Parser",
    "existing_file",
    "find_texts",
    "fraction",
    "inner_fraction",
    "integer",
    "lines_of",
    "non_negative_float",
    "non_negative_int",
    "pass_over",
    "positive_float",
    "positive_int",
    "read_record",
    "read_records",
    "read_text",
    "refuse",
    "replacing",
    "seed_number",
    "settle_all",
    "training_run",
    "write_whole",
]


def training_run(text: str) -> Path:
    """The type of an option that takes the OUTPUT folder of a training script."""
    if not Path(text, "arguments.json").is_file():
        raise argparse.ArgumentTypeError(f"is {text}: it must be the --output folder of a training script.")
    return Path(text)

"""Command lines of the scripts in examples/ and benchmarks/, as their main() makes them."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import ROOT

FREE = ("Path", "existing_file", "utf8", "json_object", "training_run")
"""Types of options that are no numbers."""


class _Made(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def scripts(folder: str) -> list[str]:
    """Names of the modules in a folder that make a command line."""
    return sorted(
        path.stem
        for path in (ROOT / folder).glob("*.py")
        if "Parser(" in path.read_text() and "def main(" in path.read_text()
    )


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """The command line that a script makes."""

    def made(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Made(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", made)
    with pytest.raises(_Made) as caught:
        importlib.import_module(module).main()
    return caught.value.parser


def options_of(module: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, argparse.Action]]:
    """Every option of a script that takes a value, with those of its commands, by its name."""
    parsers = [parser_of(module, monkeypatch)]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.nargs != 0:
                yield (action.option_strings or [action.dest])[0], action


def check_ranges(module: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Assert that every number of a script has a range, and says so; returns how many there are."""
    numbers = 0
    for name, action in options_of(module, monkeypatch):
        assert action.type not in (int, float, json.loads), f"{module} {name} takes any {action.type}"
        # A string whose default is a number, or a type of another name, would be a number that is overlooked.
        assert action.type is not None or not isinstance(action.default, int | float), f"{module} {name}"
        if action.type is None or getattr(action.type, "__name__", "") in FREE:
            continue
        numbers += 1
        assert callable(action.type)
        for bad in ("nan", "inf", "-inf", "-1", "1e400", "9" * 5000, "", "many"):
            with pytest.raises(argparse.ArgumentTypeError, match=r"^is .*: it must be .*\.$"):
                action.type(bad)
    return numbers


def refused(
    module: str,
    argv: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    empty: Path,
) -> str:
    """The one sentence on standard error of a command that is refused. It is run in the folder ``empty``, which it
    must leave so."""
    monkeypatch.chdir(empty)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    said = capsys.readouterr()
    assert ended.value.code == 2, (argv, ended.value.code, said.err)
    assert not said.out and said.err.count("\n") == 1, said
    assert not list(empty.iterdir())
    return said.err

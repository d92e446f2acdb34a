"""The program, run in this process."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import ROOT
from vllm_fox.cli.app import main


class Ran(NamedTuple):
    """What a command has said, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The output, which is one JSON value."""
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``vllm-fox`` with these words."""
    # vLLM's CPU worker sets it, and leaves it in the process of a test that has had an engine.
    monkeypatch.delenv("VLLM_DIST_IDENT", raising=False)

    def ran(*arguments: str | Path) -> Ran:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return ran


def documented(heading: str) -> set[str]:
    """The JSON keys that docs/command_line.md lists under a heading."""
    text = (ROOT / "docs" / "command_line.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
    return {key for cell in cells for key in re.findall(r"`(\w+)`", cell)}

"""How many requests fit a GPU, and checkpoints with random weights: both as their command lines do it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import capacity, checkpoint
from tests.support import ROOT
from vllm_fox.cli.facts import facts_of


def test_the_table_in_the_docs_is_what_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["capacity"])
    capacity.main()
    rows = [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[2:]]
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert len(rows) == 6
    for _, tokens, live, kv, fit, dense in rows:
        assert f"| {tokens} | {live.replace('%', ' %')} | {kv} | {fit} | {dense} |" in page


def test_a_checkpoint_has_the_sizes_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["fox", str(tmp_path / "fox"), "--layers=2", "--hidden=64", "--heads=2"]
    monkeypatch.setattr(sys, "argv", ["checkpoint", *words])
    checkpoint.main()
    facts = facts_of(tmp_path / "fox")
    assert facts.family == "Forgetting Transformers" and facts.layers == 2
